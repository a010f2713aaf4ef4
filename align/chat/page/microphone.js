// Runs beside the page and hands it what the microphone hears, sample by sample, as it is.

class Microphone extends AudioWorkletProcessor {
  process([input]) {
    if (input.length) this.port.postMessage(input[0].slice());
    return true;
  }
}

registerProcessor("microphone", Microphone);
