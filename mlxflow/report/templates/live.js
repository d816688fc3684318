"use strict";
(() => {
  const every = 1000;
  const note = document.createElement("p");
  note.className = "live";
  note.setAttribute("role", "status");
  document.querySelector("header").append(note);
  const say = (words) => { if (note.textContent !== words) note.textContent = words; };
  const opened = () => new Set([...document.querySelectorAll("details[open] > summary")].map((one) => one.textContent));
  let tag = "";

  const replace = (text) => {
    const drawn = new DOMParser().parseFromString(text, "text/html");
    const open = opened();
    const focused = document.activeElement && document.activeElement.closest("main");
    if (focused && document.activeElement.matches("input")) return false; // a switch is in use
    for (const name of ["main", "header h1", "header .facts", "header nav"]) {
      const [before, after] = [document.querySelector(name), drawn.querySelector(name)];
      if (before && after) before.replaceWith(document.adoptNode(after));
      else if (after) document.querySelector("header h1").after(document.adoptNode(after));
    }
    for (const one of document.querySelectorAll("details > summary")) {
      if (open.has(one.textContent)) one.parentElement.open = true;
    }
    document.title = drawn.title;
    document.dispatchEvent(new Event("mlxflow:drawn"));
    return true;
  };

  const look = async () => {
    try {
      const answer = await fetch("/", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
      if (answer.status === 200) {
        const text = await answer.text();
        if (!tag || replace(text)) tag = answer.headers.get("ETag");
      }
      say(answer.ok || answer.status === 304 ? "Live: this page follows the run." : `The server answered ${answer.status}.`);
    } catch {
      say("The server has ended: this page no longer follows the run.");
    }
    setTimeout(look, every);
  };
  look();
})();
