// A clip to look at: its waveform, the words on it where a policy knows their times, and a range to cut out.

import { button, element } from "./elements.js";
import { Clip } from "./clips.js";
import { request } from "./server.js";

const HEIGHT = 56;

export class ClipView {
  // `remove` is called by the button of that name, `use` with a clip that was cut out, `fail` with errors.
  constructor(clip, { remove, use, fail }) {
    this.clip = clip;
    this.use = use;
    this.fail = fail;
    this.range = null;
    this.canvas = element("canvas", { height: HEIGHT, title: "Drag to choose a range" });
    this.canvas.setAttribute("aria-label", `Waveform of ${clip.name}`);
    this.canvas.setAttribute("role", "img");
    this.words = element("div", { className: "words", hidden: true });
    this.chosen = element("div", { className: "range", hidden: true });
    this.playing = button("Play", () => this.toggle(), "small");
    this.asking = button("Words", () => this.askForWords(), "plain", {
      title: "When is which word said?",
      hidden: !clip.buffer,
    });
    this.removing = button("Remove", remove, "plain");
    const seconds = clip.duration ? `${clip.duration.toFixed(2)} s` : "";
    this.element = element(
      "div",
      { className: "clip" },
      element(
        "div",
        { className: "clip-head" },
        this.playing,
        element("span", { className: "clip-name", text: clip.name, title: clip.name }),
        element("span", { className: "grow", text: seconds }),
        this.asking,
        this.removing,
      ),
      clip.buffer ? element("div", { className: "wave" }, this.canvas, this.words) : null,
      this.chosen,
    );
    this.listen();
    if (clip.buffer) new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  listen() {
    const { audio } = this.clip;
    audio.addEventListener("play", () => this.follow());
    audio.addEventListener("pause", () => (this.playing.textContent = "Play"));
    let from = null;
    const timeAt = (event) => {
      const box = this.canvas.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      return Math.max(0, Math.min(1, share)) * this.clip.duration;
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      from = timeAt(event);
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (from !== null) this.choose(Math.min(from, timeAt(event)), Math.max(from, timeAt(event)));
    });
    this.canvas.addEventListener("pointerup", (event) => {
      const to = timeAt(event);
      if (Math.abs(to - from) < 0.02) {
        this.choose(null);
        audio.currentTime = to;
        this.draw();
      }
      from = null;
    });
  }

  toggle() {
    const { audio } = this.clip;
    if (!audio.paused) return audio.pause();
    if (this.range) audio.currentTime = this.range[0];
    return audio.play().catch(() => this.fail(new Error(`The browser cannot play ${this.clip.name}.`)));
  }

  follow() {
    const { audio } = this.clip;
    this.playing.textContent = "Pause";
    const step = () => {
      if (this.range && audio.currentTime >= this.range[1]) audio.pause();
      this.draw();
      if (!audio.paused) requestAnimationFrame(step);
    };
    step();
  }

  // A clip that is sent cannot be removed; one that comes back can.
  settle(isSent) {
    this.removing.hidden = isSent;
  }

  choose(start, end) {
    this.range = start === null ? null : [start, end];
    this.chosen.hidden = this.range === null;
    if (this.range) {
      this.chosen.replaceChildren(
        element("span", { text: `${start.toFixed(2)} to ${end.toFixed(2)} s` }),
        button("Play it", () => {
          this.clip.audio.pause();
          this.toggle();
        }, "small"),
        button("Save as WAV", () => this.save(), "small"),
        button("Use as a clip", () => this.cutOut().then(this.use), "small"),
        button("Clear", () => this.choose(null), "plain"),
      );
    }
    for (const word of this.words.children) word.classList.toggle("chosen", this.isChosen(word));
    this.draw();
  }

  isChosen(word) {
    const start = Number(word.dataset.start), end = Number(word.dataset.end);
    return this.range !== null && start >= this.range[0] - 0.001 && end <= this.range[1] + 0.001;
  }

  nameOfCut() {
    const [start, end] = this.range.map((time) => time.toFixed(2));
    return `${this.clip.name.replace(/\.[^.]*$/, "")} ${start}-${end}.wav`;
  }

  cutOut() {
    return Clip.of(this.nameOfCut(), this.clip.cut(...this.range), this.clip.isKnown);
  }

  save() {
    const href = URL.createObjectURL(new Blob([this.clip.cut(...this.range)], { type: "audio/wav" }));
    element("a", { href, download: this.nameOfCut() }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10000);
  }

  async askForWords() {
    this.asking.disabled = true;
    this.asking.textContent = "Words …";
    const form = new FormData();
    form.append("model", "policy");
    form.append("file", new Blob([this.clip.bytes]), "clip");
    form.append("response_format", "verbose_json");
    form.append("timestamp_granularities[]", "word");
    try {
      const { words } = await (await request("POST", "api/words", form)).json();
      this.showWords(words);
    } catch (error) {
      this.asking.textContent = "Words";
      this.fail(error);
    }
    this.asking.disabled = false;
  }

  showWords(words) {
    this.asking.textContent = words ? "Words" : "No times of words";
    this.asking.title = words ? "" : "No policy here has learnt when words are said.";
    this.words.hidden = !words;
    const total = this.clip.duration;
    this.words.replaceChildren(
      ...(words || []).map(({ word, start, end }) => {
        const made = button(word, (event) => this.chooseWord(start, end, event.shiftKey), "word", {
          title: `${word}, ${start.toFixed(2)} to ${end.toFixed(2)} s; Shift for a range`,
          data: { start, end },
        });
        made.style.left = `${(100 * start) / total}%`;
        made.style.width = `${(100 * (end - start)) / total}%`;
        return made;
      }),
    );
    this.draw();
  }

  chooseWord(start, end, isFurther) {
    const [from, to] = isFurther && this.range ? this.range : [start, end];
    this.choose(Math.min(from, start), Math.max(to, end));
  }

  draw() {
    const { canvas, clip } = this;
    const width = Math.round(canvas.clientWidth * devicePixelRatio);
    if (!width) return;
    canvas.width = width;
    canvas.height = HEIGHT * devicePixelRatio;
    const context = canvas.getContext("2d");
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
    const x = (time) => (time / clip.duration) * width;
    if (this.range) {
      context.fillStyle = colour("--after-soft");
      context.fillRect(x(this.range[0]), 0, x(this.range[1]) - x(this.range[0]), canvas.height);
    }
    this.peaks ??= peaks(clip.mono());
    const [chosen, others] = [colour("--after"), colour(this.range ? "--before" : "--after")];
    const bars = Math.min(this.peaks.length, Math.floor(width / (3 * devicePixelRatio)));
    for (let i = 0; i < bars; i++) {
      const from = Math.floor((i * this.peaks.length) / bars), to = Math.ceil(((i + 1) * this.peaks.length) / bars);
      const height = Math.max(1, Math.max(...this.peaks.subarray(from, to)) * canvas.height * 0.95);
      const time = ((i + 0.5) * clip.duration) / bars;
      const isChosen = this.range && time >= this.range[0] && time <= this.range[1];
      context.fillStyle = isChosen ? chosen : others;
      context.fillRect((i * width) / bars, (canvas.height - height) / 2, (0.66 * width) / bars, height);
    }
    context.fillStyle = colour("--bad");
    if (clip.audio.currentTime) context.fillRect(x(clip.audio.currentTime), 0, 2 * devicePixelRatio, canvas.height);
  }
}

// The largest sample of each of up to 1,000 pieces, as a share of the largest of all.
function peaks(samples) {
  const n = Math.min(1000, samples.length);
  const found = new Float32Array(n);
  let largest = 1e-6;
  for (let i = 0; i < samples.length; i++) {
    const size = Math.abs(samples[i]), place = Math.floor((i * n) / samples.length);
    if (size > found[place]) found[place] = size;
    if (size > largest) largest = size;
  }
  return found.map((size) => size / largest);
}
