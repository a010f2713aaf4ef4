// Clips: recorded, dropped or cut out of others; and their bytes as WAV.

const DECODING_HZ = 48000;
let recordings = 0;

export class Clip {
  // `isKnown`: whoever recorded it has heard it.
  constructor(name, bytes, isKnown = false) {
    this.name = name;
    this.bytes = bytes;
    this.isKnown = isKnown;
    this.words = null;
    this.buffer = null; // samples, where the browser can decode it
    this.audio = new Audio();
    this.audio.src = URL.createObjectURL(new Blob([bytes]));
  }

  static async of(name, bytes, isKnown = false) {
    const clip = new Clip(name, bytes, isKnown);
    try {
      clip.buffer = await new OfflineAudioContext(1, 1, DECODING_HZ).decodeAudioData(bytes.slice().buffer);
    } catch {
      // the server may know a format that the browser does not
    }
    return clip;
  }

  get duration() {
    return this.buffer ? this.buffer.duration : this.audio.duration || 0;
  }

  // Share of the clip that was played, or 1 of a recording.
  get heard() {
    if (this.isKnown) return 1;
    const { played, duration } = this.audio;
    let seconds = 0;
    for (let i = 0; i < played.length; i++) seconds += played.end(i) - played.start(i);
    return duration > 0 ? Math.min(1, seconds / duration) : 0;
  }

  get part() {
    let text = "";
    for (let i = 0; i < this.bytes.length; i += 8192) text += String.fromCharCode(...this.bytes.subarray(i, i + 8192));
    return { type: "input_audio", input_audio: { data: btoa(text), format: "wav" } };
  }

  mono() {
    const channels = Array.from({ length: this.buffer.numberOfChannels }, (_, i) => this.buffer.getChannelData(i));
    if (channels.length === 1) return channels[0];
    return channels[0].map((_, i) => channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length);
  }

  cut(start, end) {
    const rate = this.buffer.sampleRate;
    return wav(this.mono().subarray(Math.round(start * rate), Math.round(end * rate)), rate);
  }
}

// 16-bit mono WAV.
export function wav(samples, rate) {
  const bytes = new Uint8Array(44 + 2 * samples.length);
  const view = new DataView(bytes.buffer);
  const write = (place, text) => [...text].forEach((letter, i) => view.setUint8(place + i, letter.charCodeAt(0)));
  write(0, "RIFF");
  view.setUint32(4, bytes.length - 8, true);
  write(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  write(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => view.setInt16(44 + 2 * i, Math.round(Math.max(-1, Math.min(1, sample)) * 32767), true));
  return bytes;
}

export async function filesToClips(files) {
  return Promise.all(Array.from(files, async (file) => Clip.of(file.name, new Uint8Array(await file.arrayBuffer()))));
}

// Records until `stop`; nothing is changed about the sound.
export class Recording {
  static async start() {
    const sound = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    const stream = await navigator.mediaDevices.getUserMedia({ audio: sound });
    const context = new AudioContext();
    await context.audioWorklet.addModule("microphone.js");
    return new Recording(stream, context);
  }

  constructor(stream, context) {
    this.stream = stream;
    this.context = context;
    this.pieces = [];
    this.n = 0;
    const microphone = new AudioWorkletNode(context, "microphone");
    microphone.port.onmessage = ({ data }) => {
      this.pieces.push(data);
      this.n += data.length;
    };
    context.createMediaStreamSource(stream).connect(microphone).connect(context.destination); // silent
  }

  get seconds() {
    return this.n / this.context.sampleRate;
  }

  async stop(longestS) {
    this.stream.getTracks().forEach((track) => track.stop());
    const rate = this.context.sampleRate;
    await this.context.close();
    const samples = new Float32Array(Math.min(this.n, Math.floor(longestS * rate)));
    let place = 0;
    for (const piece of this.pieces) {
      samples.set(piece.subarray(0, samples.length - place), place);
      place = Math.min(place + piece.length, samples.length);
    }
    recordings += 1;
    return Clip.of(`recording ${recordings}.wav`, wav(samples, rate), true);
  }
}
