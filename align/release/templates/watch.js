// Fetches the page again every few seconds and replaces the parts that have changed. A page that nobody looks
// at fetches nothing; a part whose clip plays is left until it ends.

const EVERY_MS = 3000;
const live = document.getElementById("live");

function isPlaying(part) {
  return [...part.querySelectorAll("audio")].some((clip) => !clip.paused);
}

async function refresh() {
  const answer = await fetch("/", { cache: "no-store" });
  if (answer.redirected) {
    location.replace(answer.url);
    return;
  }
  if (!answer.ok) throw new Error(String(answer.status));
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  document.title = fresh.title;
  for (const part of document.querySelectorAll("[data-part]")) {
    const next = fresh.querySelector(`[data-part="${part.dataset.part}"]`);
    if (next && next.innerHTML !== part.innerHTML && !isPlaying(part)) part.replaceChildren(...next.childNodes);
  }
}

async function loop() {
  if (!document.hidden) {
    try {
      await refresh();
      live.textContent = `as of ${new Date().toLocaleTimeString()}`;
    } catch {
      live.textContent = "no answer: is `align watch` still running?";
    }
  }
  setTimeout(loop, EVERY_MS);
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh().catch(() => {});
});
setTimeout(loop, EVERY_MS);
