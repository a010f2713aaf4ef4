// What is kept: the list of it, each with a button that deletes it.

import { button, byId, element } from "./elements.js";
import { json, request } from "./server.js";

const AXES = { factuality: "facts", behaviour: "what was asked for" };

export async function showKept(fail) {
  try {
    const { kept } = await json("GET", "api/kept");
    byId("kept-count").textContent = kept.length ? `(${kept.length})` : "(none)";
    byId("kept-list").replaceChildren(...kept.map((row) => entry(row, fail)));
  } catch (error) {
    fail(error);
  }
}

export async function deleteKept(id, fail) {
  try {
    await json("DELETE", `api/kept/${id}`);
    document.dispatchEvent(new CustomEvent("judgement-deleted", { detail: id }));
  } catch (error) {
    fail(error);
  }
  await showKept(fail);
}

function entry(row, fail) {
  const head = [row.at ? row.at.replace("T", " ").replace("+00:00", " UTC") : "", row.annotator, verdict(row)];
  const heard = row.heard === null ? "" : `heard ${Math.round(100 * row.heard)} %`;
  return element(
    "div",
    { className: "kept" },
    element(
      "div",
      { className: "bar" },
      element("span", { className: "muted", text: [...head, heard].filter(Boolean).join(" · ") }),
      element(
        "span",
        {},
        ...row.clips.map((path, i) => button(`Play ${i + 1}`, () => play(path, fail), "plain")),
        button("Delete", () => deleteKept(row.id, fail), "plain"),
      ),
    ),
    element("p", { className: "question", text: row.question || "(asked by voice)" }),
    element(
      "div",
      { className: row.texts.length === 2 ? "answers two" : "answers" },
      ...row.texts.map((text, i) =>
        element(
          "div",
          {},
          element("span", { className: "muted", text: row.names[i] }),
          element("p", { text: text || "(nothing)" }),
        ),
      ),
    ),
  );
}

function verdict(row) {
  const said = Object.entries(AXES)
    .filter(([axis]) => row[axis])
    .map(([axis, words]) => [order(row[axis], row.names), words]);
  const thumbs = row.thumbs.map((good, i) => (good === null ? "" : `${row.names[i]} is ${good ? "good" : "bad"}`));
  const orders = new Set(said.map(([text]) => text));
  const first = orders.size === 1 && said.length === 2 ? [said[0][0]] : said.map(([text, words]) => `${text} on ${words}`);
  return [...first, ...thumbs].filter(Boolean).join(", ");
}

function order({ ranks, all_bad: allBad }, names) {
  if (allBad) return "both bad";
  if (ranks[0] === ranks[1]) return "the same";
  return `${names[ranks[0] < ranks[1] ? 0 : 1]} is better`;
}

async function play(path, fail) {
  try {
    const name = path.replace("clips/", "");
    const audio = new Audio(URL.createObjectURL(await (await request("GET", `api/kept/clips/${name}`)).blob()));
    await audio.play();
  } catch (error) {
    fail(error);
  }
}
