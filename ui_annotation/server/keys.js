// P plays and pauses, so that hands stay on the keys that answer: digits choose, Enter submits.
//
// With several clips, P goes through them: it pauses the one that plays, else starts the first that has not been
// played to its end, else the first again. Argilla answers keys only while the focus is in its form, so a click on
// a player gives the focus back to where it was.
(() => {
  "use strict";

  const isTyping = (element) => element.matches?.('[contenteditable="true"], textarea, input:not([type="checkbox"])');

  document.addEventListener("keydown", (event) => {
    if (event.key.toLowerCase() !== "p" || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (isTyping(event.target)) return;
    const players = [...document.querySelectorAll("audio")];
    if (players.length === 0) return;
    event.preventDefault();
    const playing = players.find((player) => !player.paused);
    if (playing) playing.pause();
    else (players.find((player) => !player.ended) ?? players[0]).play().catch(() => {}); // its error shows in the player
  }, true); // captured: a ranking lets no key through

  let before = null; // where the focus was when a click took it to a player
  document.addEventListener("focusin", (event) => {
    if (event.target instanceof HTMLAudioElement) before = event.relatedTarget;
  });
  for (const change of ["play", "pause"]) {
    document.addEventListener(change, (event) => {
      const byClick = event.target === document.activeElement && !event.target.matches(":focus-visible");
      if (byClick && before?.isConnected) before.focus();
    }, true);
  }
})();
