"use strict";
(() => {
  const every = 1000;
  const focusable = "main summary, main input, main .area, main a, main .scroll";
  const note = document.createElement("p");
  note.className = "live";
  note.setAttribute("role", "status");
  document.querySelector("header").append(note);
  let tag = "";
  let held = false; // while a switch is dragged, the page stays as it is
  document.addEventListener("pointerdown", (event) => { held = event.target instanceof Element && event.target.closest("main .area, main input") !== null; });
  for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, () => { held = false; });

  const say = (words, ended) => {
    if (note.textContent !== words) note.textContent = words;
    note.classList.toggle("ended", ended);
  };
  const opened = () => new Map([...document.querySelectorAll("details")].map((one) => [one.querySelector("summary").textContent, one.open]));

  const replace = (text) => {
    const drawn = new DOMParser().parseFromString(text, "text/html");
    const open = opened();
    const focused = [...document.querySelectorAll(focusable)].indexOf(document.activeElement);
    for (const name of ["main", "header h1", "header .facts", "header nav"]) {
      const [before, after] = [document.querySelector(name), drawn.querySelector(name)];
      if (before && after) before.replaceWith(document.adoptNode(after));
      else if (after) document.querySelector("header h1").after(document.adoptNode(after));
    }
    for (const one of document.querySelectorAll("details")) {
      const was = open.get(one.querySelector("summary").textContent);
      if (was !== undefined) one.open = was;
    }
    document.title = drawn.title;
    document.dispatchEvent(new Event("mlxflow:drawn"));
    const again = focused < 0 ? null : document.querySelectorAll(focusable)[focused];
    if (again) again.focus({ preventScroll: true });
  };

  const look = async () => {
    try {
      const answer = await fetch("/", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
      if (answer.status === 200 && !held) {
        const text = await answer.text();
        if (!held) {
          replace(text);
          tag = answer.headers.get("ETag");
        }
      }
      const follows = answer.ok || answer.status === 304;
      say(follows ? "Live: this page follows the run." : "The page cannot be drawn: see the terminal of mlxflow report.", !follows);
    } catch {
      say("mlxflow report has ended: this page no longer follows the run.", true);
    }
    setTimeout(look, every);
  };
  look();
})();
