// Reports to the server how much of each clip was played in this browser, and when its user signs out.
//
// Argilla's UI is a single page in which <audio> elements come and go, so nothing is attached to them: media
// events do not bubble, but they can be captured at the document.
(() => {
  "use strict";

  const CLIP = /^\/media\/[\w-]+\/[0-9a-f]{64}\.\w+$/;
  const TICK_MS = 1000;
  const REPORT_EVERY_S = 2;
  const FASTEST = 2; // of the normal speed; the server counts no more than can be played at it
  const TOKEN = "auth._token.local"; // where Argilla's UI keeps its token; "false" when signed out

  // address of a clip -> {ranges: [[from_s, to_s], ...] played so far, duration, reported: from_s -> to_s}
  const clips = new Map();
  // elements that played since the last tick: also those the page threw away while they did
  const active = new Set();

  function address(audio) {
    try {
      const url = new URL(audio.currentSrc || audio.src, location.href);
      return url.origin === location.origin && CLIP.test(url.pathname) ? url.pathname : null;
    } catch {
      return null; // no address, or none that can be read
    }
  }

  function union(ranges) {
    const merged = [];
    for (const [from, to] of ranges.sort((a, b) => a[0] - b[0])) {
      const last = merged[merged.length - 1];
      if (last && from <= last[1]) last[1] = Math.max(last[1], to);
      else merged.push([from, to]);
    }
    return merged;
  }

  // Adds what an element has played to what was known of its clip.
  function note(audio) {
    const path = address(audio);
    if (!path || !Number.isFinite(audio.duration) || audio.duration <= 0) return null;
    const clip = clips.get(path) || { ranges: [], reported: new Map() };
    const played = Array.from({ length: audio.played.length }, (_, i) => [audio.played.start(i), audio.played.end(i)]);
    clip.duration = audio.duration;
    clip.ranges = union(clip.ranges.concat(played));
    clips.set(path, clip);
    return path;
  }

  // Reports the parts of a clip of which at least `more_s` seconds are news. The server joins the parts, also
  // those of another tab or from before a reload.
  function report(path, more_s) {
    const { ranges, duration, reported } = clips.get(path);
    for (const [from, to] of ranges) {
      const news = to - (reported.get(from) ?? from);
      if (news <= 0 || news < more_s) continue;
      reported.set(from, to);
      const share = Math.min(to / duration, 1) - from / duration;
      fetch(`${path}/heard?from=${from / duration}&share=${share}`, {
        method: "POST",
        keepalive: true, // goes out even while the page is being closed
      }).then(
        (answer) => { if (answer.status >= 500) reported.delete(from); },
        () => reported.delete(from), // no connection: reported again with the next tick
      );
    }
  }

  function onPlaying(event) {
    if (event.target instanceof HTMLMediaElement) active.add(event.target);
  }

  function onStop(event) {
    const path = event.target instanceof HTMLMediaElement ? note(event.target) : null;
    if (path) report(path, 0);
  }

  function reportAll(more_s) {
    const playing = new Set();
    for (const audio of active) {
      const path = note(audio);
      if (audio.paused) active.delete(audio);
      else playing.add(path);
    }
    for (const path of clips.keys()) report(path, playing.has(path) ? more_s : 0);
  }

  // The cookie that lets clips in cannot be seen from here, but the token it came with can.
  let wasSignedIn = false;
  function endCookieOnSignOut() {
    const token = localStorage.getItem(TOKEN);
    const isSignedIn = Boolean(token) && token !== "false";
    if (wasSignedIn && !isSignedIn) fetch("/media/sign-out", { method: "POST", keepalive: true }).catch(() => {});
    wasSignedIn = isSignedIn;
  }

  document.addEventListener("ratechange", (event) => {
    if (event.target.playbackRate > FASTEST) event.target.playbackRate = FASTEST;
  }, true);
  document.addEventListener("timeupdate", onPlaying, true);
  document.addEventListener("pause", onStop, true);
  document.addEventListener("ended", onStop, true);
  document.addEventListener("visibilitychange", () => {
    if (document.visibilityState === "hidden") reportAll(0);
  });
  setInterval(() => {
    reportAll(REPORT_EVERY_S);
    endCookieOnSignOut();
  }, TICK_MS);
})();
