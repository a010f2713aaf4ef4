"use strict";
const cards = [...document.querySelectorAll(".card")];
const category = document.getElementById("category");
const outcome = document.getElementById("outcome");
const toolbar = document.querySelector(".toolbar");

function visible() {
  return cards.filter((card) => !card.hidden);
}

function filter() {
  for (const card of cards) {
    card.hidden =
      (category.value !== "" && card.dataset.category !== category.value) ||
      (outcome.value !== "" && card.dataset.outcome !== outcome.value);
  }
  document.getElementById("shown").textContent = visible().length + " shown";
}

function move(by) {
  const shown = visible();
  const at = shown.indexOf(document.activeElement.closest(".card"));
  const next = shown[at < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, at + by))];
  if (next) {
    next.focus({ preventScroll: true });
    scrollTo({ top: next.offsetTop - toolbar.offsetHeight - 12 });
  }
}

function play(card) {
  const audio = card.querySelector("audio");
  if (audio && audio.paused) audio.play();
  else if (audio) audio.pause();
}

category.addEventListener("change", filter);
outcome.addEventListener("change", filter);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, audio")) return;
  if (event.key === "j") move(1);
  else if (event.key === "k") move(-1);
  else if (event.key === " " && event.target.matches(".card")) {
    event.preventDefault();
    play(event.target);
  }
});
