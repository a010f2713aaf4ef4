// The conversation: what is asked, the answers as they come, and what is said of them.

import { Recording, filesToClips } from "./clips.js";
import { button, byId, element, press } from "./elements.js";
import { deleteKept, showKept } from "./kept.js";
import { events, json } from "./server.js";
import { ClipView } from "./waveform.js";

const COUNTS_FROM = 0.8; // share of the clips that must be heard for a judgement to count
const CHOICES = { a: "A is better", b: "B is better", tie: "The same", both_bad: "Both bad" };
const ABOUT = { both: "overall", factuality: "in its facts", behaviour: "in doing what was asked" };
let about = null;
let waiting = []; // views of clips that are not sent yet
let turns = [];
let recording = null;

function fail(error) {
  byId("problem").textContent = error.message;
  byId("problem").hidden = false;
}

// -------------------------------------------------------------------------- your turn

function addClip(clip) {
  const view = new ClipView(clip, { remove: () => removeClip(view), use: addClip, fail });
  wait(view);
}

function wait(view) {
  view.settle(false);
  waiting.push(view);
  byId("clips").append(view.element);
  ready();
}

function removeClip(view) {
  view.clip.audio.pause();
  waiting = waiting.filter((other) => other !== view);
  view.element.remove();
  URL.revokeObjectURL(view.clip.audio.src);
  ready();
}

async function addFiles(files) {
  byId("problem").hidden = true;
  (await filesToClips(files)).forEach(addClip);
}

async function record() {
  try {
    if (recording) {
      const done = recording;
      recording = null;
      addClip(await done.stop(about.longest_s));
    } else {
      recording = await Recording.start();
      showTime();
    }
  } catch (error) {
    recording = null;
    fail(new Error(`The microphone cannot be used: ${error.message}`));
  }
  byId("record").classList.toggle("recording", recording !== null);
  if (!recording) byId("record").textContent = "Record";
  ready();
}

function showTime() {
  if (!recording) return;
  byId("record").textContent = `Stop recording  ${recording.seconds.toFixed(1)} s`;
  if (recording.seconds >= about.longest_s) record();
  else setTimeout(showTime, 100);
}

function ready() {
  const isComing = turns.some((turn) => turn.isComing);
  const isSomething = waiting.length > 0 || byId("question").value.trim() !== "";
  byId("ask").disabled = !isSomething || isComing || recording !== null || about?.state !== "ready";
  byId("stop").hidden = !isComing;
  byId("restart").hidden = turns.length === 0 || isComing;
  byId("hint").textContent = hint();
  byId("record").disabled = about === null;
}

function hint() {
  if (!about) return "";
  const tooLong = waiting.find((view) => view.clip.duration > about.longest_s);
  if (tooLong) return `${tooLong.clip.name} is longer than the ${about.longest_s} s that are heard: cut a range out.`;
  return waiting.length && !byId("question").value.trim() ? "Without a question, the clips ask." : "";
}

function send(event) {
  event?.preventDefault();
  if (byId("ask").disabled) return;
  const views = waiting;
  waiting = [];
  for (const view of views) {
    view.settle(true);
    view.element.remove();
  }
  const turn = new Turn(byId("question").value.trim(), views);
  byId("question").value = "";
  turns.push(turn);
  turns.at(-2)?.showVote(); // it is no longer the last
  byId("conversation").append(turn.element);
  turn.ask();
}

function restart() {
  for (const turn of turns) turn.views.forEach((view) => view.clip.audio.pause());
  turns = [];
  byId("conversation").replaceChildren();
  ready();
}

function body(last) {
  const system = byId("system").value;
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns.slice(0, turns.indexOf(last) + 1)) {
    messages.push({ role: "user", content: [...turn.views.map((view) => view.clip.part), ...turn.textPart] });
    if (turn !== last) messages.push({ role: "assistant", content: turn.continuation });
  }
  const number = (id) => byId(id).valueAsNumber;
  const seed = Number.isNaN(number("seed")) ? crypto.getRandomValues(new Uint32Array(1))[0] : number("seed");
  const sampling = { temperature: number("temperature"), top_p: number("top_p"), max_tokens: number("max_tokens") };
  return { model: "policy", messages, seed, ...sampling };
}

// -------------------------------------------------------------------------- a turn

class Turn {
  constructor(text, views) {
    this.text = text;
    this.views = views;
    for (const { clip } of views) clip.audio.addEventListener("pause", showHeard);
    this.answersPlace = element("div");
    this.votePlace = element("div", { className: "vote", hidden: true });
    this.element = element(
      "article",
      { className: "turn" },
      ...views.map((view) => view.element),
      text ? element("p", { className: "question", text }) : null,
      this.answersPlace,
      this.votePlace,
    );
  }

  get textPart() {
    return this.text ? [{ type: "text", text: this.text }] : [];
  }

  get isComing() {
    return Boolean(this.controller);
  }

  // The answer with which the conversation goes on.
  get continuation() {
    return this.answers[this.goesOnWith].text;
  }

  // The least share of a clip that was heard, of this turn and those before it.
  get heard() {
    const clips = turns.slice(0, turns.indexOf(this) + 1).flatMap((turn) => turn.views.map((view) => view.clip));
    return Math.min(1, ...clips.map((clip) => clip.heard));
  }

  async ask() {
    byId("problem").hidden = true;
    Object.assign(this, { id: null, vote: null, kept: null, names: null, goesOnWith: 0, isSame: false });
    this.controller = new AbortController();
    this.answers = about.policies.map((_, place) => new Answer(this, place));
    this.votePlace.hidden = true;
    this.answersPlace.className = about.policies.length === 2 ? "answers two" : "answers";
    this.answersPlace.replaceChildren(...this.answers.map((answer) => answer.element));
    ready();
    this.answersPlace.scrollIntoView({ block: "nearest" });
    try {
      this.id = (await json("POST", "api/turns", body(this))).id;
      await Promise.all(this.answers.map((answer) => answer.stream(this.id, this.controller.signal)));
      if (this.isWhole) {
        const { names, same } = await json("GET", `api/turns/${this.id}/names`);
        Object.assign(this, { names, isSame: same });
      }
    } catch (error) {
      this.answers.forEach((answer) => answer.end("failed"));
      fail(error);
    }
    this.controller = null;
    if (!this.id) return this.withdraw();
    this.showVote();
    ready();
  }

  // The server has refused it: what was asked goes back to where it can be changed.
  withdraw() {
    turns = turns.filter((turn) => turn !== this);
    this.element.remove();
    byId("question").value ||= this.text;
    this.views.forEach(wait);
    turns.at(-1)?.showVote();
    ready();
  }

  get isWhole() {
    return this.answers.every((answer) => answer.finish === "stop" || answer.finish === "length");
  }

  get isLast() {
    return turns.at(-1) === this;
  }

  get isBlind() {
    return this.answers.length === 2 && !this.names;
  }

  // -------------------------------------------------------------------------- what is said of it

  showVote() {
    const title = "Another draw of the answers";
    const again = button("Ask again", () => this.ask(), "plain", { title, hidden: !this.isLast });
    this.votePlace.hidden = false;
    this.answers.forEach((answer) => answer.showWho(this));
    if (!this.isWhole) {
      const text = "An answer is not whole, so there is nothing to judge.";
      this.votePlace.replaceChildren(element("div", { className: "bar" }, element("span", { className: "grow", text }), again));
    } else if (this.answers.length === 2 && !this.isSame) {
      this.votePlace.replaceChildren(this.choices(again), this.afterVote(), this.heardNote());
    } else {
      const after = this.afterVote();
      if (this.isSame) after.prepend(element("span", { text: "Both gave the same answer." }));
      after.append(element("span", { className: "grow" }), again);
      this.votePlace.replaceChildren(after, this.heardNote());
    }
  }

  choices(again) {
    const select = element(
      "select",
      { disabled: this.vote !== null, on: { change: () => (this.about = select.value) } },
      ...Object.entries(ABOUT).map(([value, text]) => element("option", { value, text })),
    );
    select.setAttribute("aria-label", "Better in what?");
    select.value = this.about ?? "both";
    const buttons = Object.entries(CHOICES).map(([choice, text]) => {
      const made = button(text, () => this.judge({ better: choice, about: select.value }), "small", {
        disabled: this.vote !== null,
        data: { choice },
      });
      press(made, this.vote?.better === choice);
      return made;
    });
    return element("div", { className: "bar" }, ...buttons, select, element("span", { className: "grow" }), again);
  }

  afterVote() {
    const after = element("div", { className: "bar after-vote" });
    if (this.kept) {
      after.append(
        element("span", { text: "Kept." }),
        button("Delete", () => deleteKept(this.kept, fail), "plain"),
      );
    } else if (this.vote) {
      after.append(element("span", { text: "Not kept." }));
      if (about.keeps_in) after.append(button("Keep it", () => this.judge(this.vote, true), "plain"));
    }
    return after;
  }

  heardNote() {
    const share = Math.round(100 * this.heard);
    const text = `You have heard ${share} % of a clip: a judgement that is kept counts from 80 % on.`;
    return element("p", { className: "note heard", text, hidden: this.heard >= COUNTS_FROM });
  }

  async judge(said, isKeptNow = false) {
    const thumbs = this.answers.map((answer) => answer.thumb);
    const heard = Math.min(1, this.heard); // by the time of the vote, whenever it is kept
    this.vote = { better: null, about: "both", heard, ...said, thumbs };
    const keep = byId("keep").checked || isKeptNow;
    try {
      const { names, kept } = await json("PUT", `api/turns/${this.id}/vote`, { ...this.vote, keep });
      Object.assign(this, { names, kept: kept ?? this.kept });
      if (this.isLast && this.vote.better === "b") this.goesOnWith = 1;
      if (this.isLast && this.vote.better === "a") this.goesOnWith = 0;
      if (kept) await showKept(fail);
    } catch (error) {
      this.vote = null;
      fail(error);
    }
    this.showVote();
  }

  thumbChanged() {
    const isSaid = this.answers.some((answer) => answer.thumb !== null);
    if (isSaid && !this.isBlind && this.isWhole) this.judge({ better: this.vote?.better ?? null, about: this.vote?.about ?? "both" });
    else if (!isSaid && this.kept && !this.vote?.better) deleteKept(this.kept, fail);
    else this.answers.forEach((answer) => answer.showWho(this));
  }
}

class Answer {
  constructor(turn, place) {
    this.place = place;
    this.text = "";
    this.finish = null;
    this.thumb = null;
    this.who = element("div", { className: "who" });
    this.shown = element("p");
    this.foot = element("div", { className: "bar" });
    this.element = element(
      "div",
      { className: place ? "answer second coming" : "answer coming" },
      this.who,
      this.shown,
      this.foot,
    );
    this.showWho(turn);
  }

  async stream(id, signal) {
    try {
      for await (const { text, finish, tokens, error } of events(`api/turns/${id}/answers/${this.place}`, signal)) {
        if (error) throw new Error(error.message);
        if (text) this.shown.textContent = this.text += text;
        if (finish) Object.assign(this, { finish, tokens });
      }
      this.end(this.finish ?? "failed");
    } catch (error) {
      this.end(error.name === "AbortError" ? "stopped" : "failed");
      if (error.name !== "AbortError") throw error;
    }
  }

  end(finish) {
    this.finish ??= finish;
    this.element.classList.remove("coming");
    if (!this.text) this.shown.textContent = "(nothing)";
  }

  showWho(turn) {
    const letter = "AB"[this.place];
    const name = turn.names ? turn.names[this.place] : about.policies.length === 1 ? about.policies[0] : "";
    const states = { length: `cut off after ${this.tokens} tokens`, stopped: "stopped", failed: "failed", stop: `${this.tokens} tokens` };
    const isTwo = about.policies.length === 2;
    this.who.replaceChildren(
      element("span", {}, element("strong", { text: isTwo ? letter : name }), isTwo && name ? ` ${name}` : ""),
      element("span", { text: states[this.finish] ?? "" }),
    );
    const isBest = turn.vote && { a: 0, b: 1 }[turn.vote.better] === this.place;
    this.element.classList.toggle("winner", Boolean(isBest));
    this.foot.replaceChildren(...(this.finish && turn.id ? this.buttons(turn, isTwo) : []));
  }

  buttons(turn, isTwo) {
    const thumbs = [["Good", true], ["Bad", false]].map(([text, good]) => {
      const set = () => {
        this.thumb = this.thumb === good ? null : good;
        turn.thumbChanged();
      };
      const made = button(text, set, "small", { disabled: isTwo && turn.vote !== null && !turn.isSame });
      press(made, this.thumb === good);
      return made;
    });
    const copy = button("Copy", () => navigator.clipboard.writeText(this.text).catch(fail), "plain");
    if (!isTwo) return [...thumbs, copy];
    const goOn = button("Go on with it", () => {
      turn.goesOnWith = this.place;
      turn.answers.forEach((answer) => answer.showWho(turn));
    }, "plain", { title: "The conversation goes on with this answer", disabled: !turn.isLast });
    press(goOn, turn.goesOnWith === this.place);
    return [...thumbs, element("span", { className: "grow" }), goOn, copy];
  }
}

function showHeard() {
  for (const turn of turns) if (!turn.isComing && !turn.vote) turn.showVote();
}

// -------------------------------------------------------------------------- the page

async function begin() {
  try {
    about = await json("GET", "api/about");
  } catch (error) {
    byId("state").textContent = "";
    return fail(error);
  }
  const isTwo = about.policies.length === 2;
  byId("title").textContent = about.policies.join(" and ");
  byId("subtitle").textContent = isTwo
    ? "Side by side and blind: who is A and who is B is drawn for every question, and shown once you have voted."
    : "Talk about clips, or let them talk. Everything stays on this machine.";
  byId("state").textContent = { loading: "loading …", ready: "ready", died: "" }[about.state];
  byId("max_tokens").max = about.most_tokens;
  byId("keep").disabled = !about.keeps_in;
  byId("keep-note").textContent = about.keeps_in
    ? `Votes and thumbs of ${about.annotator} go to ${about.keeps_in}, where a pairs stage reads them.`
    : "There is no run folder to keep anything in; start with --keep DIR.";
  if (about.state === "died") fail(new Error(`The engine has died: ${about.reason}. Start align chat again.`));
  if (about.state === "loading") setTimeout(begin, 500);
  else if (about.keeps_in) await showKept(fail);
  ready();
}

function listen() {
  byId("record").addEventListener("click", record);
  byId("add").addEventListener("click", () => byId("files").click());
  byId("files").addEventListener("change", async ({ target }) => {
    await addFiles(target.files);
    target.value = "";
  });
  byId("composer").addEventListener("submit", send);
  byId("question").addEventListener("input", ready);
  byId("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  byId("stop").addEventListener("click", () => turns.at(-1).controller?.abort());
  byId("restart").addEventListener("click", restart);
  document.addEventListener("judgement-deleted", ({ detail }) => {
    for (const turn of turns.filter((each) => each.kept === detail)) {
      turn.kept = null;
      turn.showVote();
    }
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    byId("composer").classList.add("over");
  });
  document.addEventListener("dragleave", () => byId("composer").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    byId("composer").classList.remove("over");
    addFiles(event.dataTransfer.files);
  });
}

listen();
begin();
