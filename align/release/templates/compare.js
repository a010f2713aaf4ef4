"use strict";
const byId = (id) => document.getElementById(id);
const numbers = JSON.parse(byId("numbers").textContent);
const packed = JSON.parse(byId("packed").textContent);
const cards = [...document.querySelectorAll(".card")];
const toolbar = document.querySelector(".toolbar");
const filters = { category: byId("category"), outcome: byId("outcome"), words: byId("words") };
const texts = new Map(); // of a card, in lower case, once searched

// The visible questions, and their address.

function text(card) {
  if (!texts.has(card)) {
    const parts = card.querySelectorAll(".question, .reference, .answer > p");
    texts.set(card, [...parts].map((part) => part.textContent).join("\n").toLowerCase());
  }
  return texts.get(card);
}

function visible() {
  return cards.filter((card) => !card.hidden);
}

function filter() {
  const words = filters.words.value.toLowerCase();
  for (const card of cards) {
    card.hidden =
      (filters.category.value !== "" && card.dataset.category !== filters.category.value) ||
      (filters.outcome.value !== "" && card.dataset.outcome !== filters.outcome.value) ||
      (words !== "" && !text(card).includes(words));
  }
  byId("visible").textContent = visible().length + " shown";
}

function current() {
  const at = new URLSearchParams(location.hash.slice(1)).get("at");
  return cards.find((card) => card.dataset.id === at && !card.hidden);
}

function remember(card) {
  const state = new URLSearchParams();
  for (const [name, field] of Object.entries(filters)) if (field.value) state.set(name, field.value);
  if (card) state.set("at", card.dataset.id);
  history.replaceState(null, "", "#" + state);
}

function restore() {
  if (!location.hash.includes("=") && location.hash.length > 1) return; // a link to a section
  const state = new URLSearchParams(location.hash.slice(1));
  for (const [name, field] of Object.entries(filters)) field.value = state.get(name) ?? "";
  for (const name of ["category", "outcome"]) if (filters[name].selectedIndex < 0) filters[name].value = "";
  filter();
  const card = current();
  if (card) show(card);
}

function show(card) {
  const stuck = getComputedStyle(toolbar).position === "sticky" ? toolbar.offsetHeight : 0;
  card.style.scrollMarginTop = stuck + 12 + "px";
  card.focus({ preventScroll: true });
  card.scrollIntoView();
  requestAnimationFrame(() => card.scrollIntoView()); // cards on the way have got their heights
}

function changed() {
  filter();
  remember(current());
}

function move(by) {
  const list = visible();
  const here = document.activeElement.closest(".card") ?? current();
  const at = list.indexOf(here);
  const next = list[at < 0 ? 0 : Math.min(list.length - 1, Math.max(0, at + by))];
  if (!next) return;
  remember(next);
  show(next);
}

// One player for all clips.

const audio = new Audio();
let playing = null;
let sought = false; // in the clip that is playing

function label(button, isPaused) {
  button.textContent = isPaused ? "▶" : "❚❚";
  button.setAttribute("aria-label", isPaused ? "Play" : "Pause");
}

function clock() {
  if (!playing || audio.error) return;
  const share = audio.duration ? audio.currentTime / audio.duration : 0;
  playing.querySelector("i").style.width = 100 * share + "%";
  playing.querySelector(".time").textContent = audio.currentTime.toFixed(1) + " s";
  label(playing.querySelector("button"), audio.paused);
  if (!audio.paused) requestAnimationFrame(clock);
}

function failed() {
  if (sought) { // browsers cannot seek in every FLAC: from the start, then
    sought = false;
    audio.load();
    return play();
  }
  playing.querySelector(".time").textContent = "not found";
  playing.querySelector(".time").classList.add("failed");
  label(playing.querySelector("button"), true);
}

function play() {
  audio.play().catch(() => {}); // another clip was chosen meanwhile, or `failed` tells
}

function load(player) {
  if (player === playing) return;
  if (playing) {
    audio.pause();
    clock();
    playing.classList.remove("on");
  }
  playing = player;
  sought = false;
  player.classList.add("on");
  audio.src = packed[player.dataset.clip] ?? player.dataset.link;
  audio.playbackRate = audio.defaultPlaybackRate = Number(byId("speed").value);
  audio.loop = byId("loop").checked;
}

function toggle(player) {
  if (!player) return;
  load(player);
  if (audio.paused) play();
  else audio.pause();
}

function seek(player, share) {
  load(player);
  const jump = () => {
    sought = true;
    audio.currentTime = share * audio.duration;
  };
  if (audio.duration) jump();
  else audio.addEventListener("loadedmetadata", jump, { once: true });
  play();
}

audio.addEventListener("error", failed);
for (const name of ["play", "pause", "seeked", "ended"]) audio.addEventListener(name, clock);
byId("speed").addEventListener("change", () => {
  audio.playbackRate = audio.defaultPlaybackRate = Number(byId("speed").value);
});
byId("loop").addEventListener("change", () => (audio.loop = byId("loop").checked));
document.addEventListener("click", (event) => {
  const player = event.target.closest(".player");
  const wave = event.target.closest(".wave");
  if (wave) seek(player, event.offsetX / wave.clientWidth);
  else if (event.target.closest(".player button")) toggle(player);
});

// Export.

function save(name, type, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function cell(value) {
  if (typeof value === "number") return String(value);
  const safe = /^[=+\-@\t\r]/.test(value ?? "") ? "'" + value : (value ?? ""); // not a formula
  return '"' + safe.replaceAll('"', '""') + '"';
}

function csv() {
  const byQuestion = new Map(numbers.questions.map((question) => [String(question.uniq_id), question]));
  const labels = numbers.policies.map((policy) => policy.label);
  const head = ["uniq_id", "category", "task", "outcome", "change", "question", "reference"];
  for (const label of labels) head.push(label + " score", label + " state", label + " answer");
  const rows = visible().map((card) => {
    const question = byQuestion.get(card.dataset.id);
    const textOf = (selector) => card.querySelector(selector).textContent;
    const row = [String(question.uniq_id), question.category, question.task, question.outcome, question.change];
    row.push(textOf(".question"), textOf(".reference").replace("Reference: ", ""));
    [...card.querySelectorAll(".answer")].forEach((answer, index) => {
      const words = answer.querySelector("p:not(.empty)");
      row.push(question.scores[index], question.states[index], words ? words.textContent : "");
    });
    return row;
  });
  return [head, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

byId("csv").addEventListener("click", () => save("compare.csv", "text/csv", "\ufeff" + csv()));
byId("json").addEventListener("click", () =>
  save("compare.json", "application/json", JSON.stringify(numbers, null, 2) + "\n"),
);

// Keyboard and start.

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input")) return;
  const outcome = filters.outcome.options[Number(event.key)];
  if (event.key === "j") move(1);
  else if (event.key === "k") move(-1);
  else if (/^[0-9]$/.test(event.key) && outcome) {
    filters.outcome.value = outcome.value;
    changed();
  } else if (event.key === " " && !event.target.closest("button, summary, a")) {
    const card = event.target.closest(".card") ?? current();
    if (card) {
      event.preventDefault();
      toggle(card.querySelector(".player"));
    }
  }
});
for (const field of Object.values(filters)) field.addEventListener("input", changed);
addEventListener("hashchange", restore);
restore();
