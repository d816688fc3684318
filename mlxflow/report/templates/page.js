"use strict";
(() => {
  const tip = document.getElementById("tip");
  const svgSpace = "http://www.w3.org/2000/svg";
  const width = 1000;
  const groups = new Map();
  const choices = new Map(); // by the caption of a figure: what a reader chose, kept when the page is drawn again

  const significant = (value) => {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en-US");
    if (size >= 1000) return Math.round(value).toLocaleString("en-US");
    return size < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };
  const bytes = (value) => {
    const units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let power = 0;
    while (Math.abs(value) >= 999.5 && power < units.length - 1) { value /= 1000; power += 1; }
    return `${significant(value)} ${units[power]}`;
  };
  const seconds = (value) => (Math.abs(value) >= 1 || value === 0 ? `${significant(value)} s` : `${significant(value * 1e3)} ms`);
  const forms = { number: significant, bytes, seconds, percent: (value) => `${significant(100 * value)} %` };

  const nearest = (xs, at) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < at) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - at) <= Math.abs(xs[high] - at) ? low : high;
  };

  // As in Python: round values between two ends, about as many as wanted
  const evenTicks = (low, high, count) => {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
    const ticks = [];
    for (let at = Math.ceil(low / step - 1e-9); at <= Math.floor(high / step + 1e-9); at += 1) ticks.push(at * step);
    return ticks;
  };
  const logTicks = (low, high, count) => {
    for (const factors of [[1, 2, 3, 5], [1, 2, 5], [1, 3], [1]]) {
      const ticks = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
        ticks.push(...factors.map((factor) => factor * 10 ** power).filter((tick) => tick >= low && tick <= high));
      }
      if (ticks.length <= count + 2) return ticks.length > 2 ? ticks : evenTicks(low, high, count);
    }
    return [low, high];
  };
  // An exponential moving average without the bias of its beginning
  const smooth = (values, weight) => {
    let sum = 0, whole = 0;
    return values.map((value) => {
      sum = sum * weight + value * (1 - weight);
      whole = whole * weight + 1 - weight;
      return sum / whole;
    });
  };

  const place = (x, y) => {
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const beyond = x + 16 + box.width > document.documentElement.clientWidth - 4;
    tip.style.left = `${Math.max(4, beyond ? x - 16 - box.width : x + 16)}px`;
    tip.style.top = `${Math.max(4, Math.min(y - box.height / 2, window.innerHeight - box.height - 4))}px`;
  };
  const hide = () => { tip.hidden = true; };

  class Plot {
    constructor(element) {
      this.area = element.querySelector(".area");
      this.axis = element.querySelector(".x");
      this.data = JSON.parse(element.querySelector("script").textContent);
      this.height = Number(this.area.getAttribute("height"));
      this.view = [this.data.low, this.data.high];
      this.words = this.axis.innerHTML;
      this.at = null;
      this.cursor = this.add("line", "cursor", { y1: 0, y2: this.height, visibility: "hidden" });
      this.selected = this.add("rect", "selected", { y: 0, height: this.height, width: 0 });
      this.words_up = element.querySelector(".y");
      this.paths = this.data.series.map((_, index) => this.area.querySelector(`[data-series="${index}"]`));
      this.group = element.dataset.group || "";
      if (this.group) groups.set(this.group, [...(groups.get(this.group) || []), this]);
      this.figure = element.closest("figure");
      if (this.figure && "switches" in this.figure.dataset) this.offer();
      this.listen();
      const kept = choices.get(this.key_of("view"));
      if (kept) this.look(kept);
    }
    key_of(what) {
      const caption = this.figure && this.figure.querySelector("figcaption");
      return `${what} ${caption ? caption.textContent : ""}`;
    }
    offer() {
      const drawn = { up: this.words_up.innerHTML, grid: this.area.querySelector(".grid").getAttribute("d"), paths: this.paths.map((path) => path.getAttribute("d")) };
      const chosen = choices.get(this.key_of("switches")) || { smoothing: 0, log: false };
      const box = document.createElement("div");
      box.className = "switches";
      const input = (word, attributes, listen) => {
        const label = document.createElement("label");
        const made = Object.assign(document.createElement("input"), attributes);
        made.addEventListener("input", () => { listen(made); choices.set(this.key_of("switches"), chosen); this.redraw(chosen, drawn); });
        label.append(...(made.type === "range" ? [word, made] : [made, word]));
        box.append(label);
      };
      input("Smoothing", { type: "range", min: 0, max: 0.98, step: 0.02, value: chosen.smoothing }, (made) => { chosen.smoothing = Number(made.value); });
      if (this.data.series.every((one) => one.y.every((value) => value > 0))) {
        input("Logarithmic scale", { type: "checkbox", checked: chosen.log }, (made) => { chosen.log = made.checked; });
      }
      this.figure.querySelector(".drawing").before(box);
      if (chosen.smoothing || chosen.log) this.redraw(chosen, drawn);
    }
    redraw({ smoothing, log }, drawn) {
      for (const raw of this.area.querySelectorAll(".raw")) raw.remove();
      let [low, high] = this.data.up;
      if (log) {
        const values = this.data.series.flatMap((one) => one.y);
        [low, high] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
        if (high / low < 2) [low, high] = [low / 1.5, high * 1.5];
        const room = (high / low) ** 0.04;
        [low, high] = [low / room, high * room];
      }
      const share = (value) => (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));
      const up = (value) => Math.round((1 - share(value)) * this.height * 10) / 10;
      const line = (one, ys) => one.x.map((x, index) => `${index ? "L" : "M"}${Math.round(this.to(x) * 10) / 10} ${up(ys[index])}`).join("") + (one.x.length === 1 ? "h0" : "");
      this.data.series.forEach((one, index) => {
        const path = this.paths[index];
        if (smoothing && one.y.length > 2) {
          const raw = path.cloneNode();
          raw.classList.add("raw");
          raw.setAttribute("d", log ? line(one, one.y) : drawn.paths[index]);
          path.before(raw);
        }
        path.setAttribute("d", smoothing || log ? line(one, smoothing ? smooth(one.y, smoothing) : one.y) : drawn.paths[index]);
      });
      const grid = this.area.querySelector(".grid");
      if (!log) { this.words_up.innerHTML = drawn.up; grid.setAttribute("d", drawn.grid); return; }
      const ticks = logTicks(low, high, 5);
      grid.setAttribute("d", ticks.map((tick) => `M0 ${up(tick)}H${width}`).join(""));
      this.words_up.textContent = "";
      for (const tick of ticks) {
        const word = document.createElementNS(svgSpace, "text");
        for (const [key, value] of [["x", 60], ["y", up(tick) + 4], ["text-anchor", "end"]]) word.setAttribute(key, value);
        word.textContent = forms[this.data.form](Number(tick.toPrecision(6)));
        this.words_up.append(word);
      }
    }
    add(name, style, attributes) {
      const made = document.createElementNS(svgSpace, name);
      made.setAttribute("class", style);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      this.area.append(made);
      return made;
    }
    listen() {
      const area = this.area;
      let begun = null;
      area.addEventListener("pointermove", (event) => {
        this.show(this.from(event.clientX), event.clientX, event.clientY);
        if (begun !== null) this.select(begun, this.from(event.clientX));
      });
      area.addEventListener("pointerleave", () => { if (begun === null) this.leave(); });
      area.addEventListener("pointerdown", (event) => {
        if (!this.group || event.pointerType === "touch" || event.button) return;
        begun = this.from(event.clientX);
        area.setPointerCapture(event.pointerId);
      });
      const end = (event) => {
        if (begun === null) return;
        const ended = this.from(event.clientX);
        this.selected.setAttribute("width", 0);
        if (Math.abs(ended - begun) > (this.view[1] - this.view[0]) / 50) this.zoom([Math.min(begun, ended), Math.max(begun, ended)]);
        begun = null;
      };
      area.addEventListener("pointerup", end);
      area.addEventListener("pointercancel", () => { begun = null; this.selected.setAttribute("width", 0); });
      area.addEventListener("dblclick", () => this.zoom(null));
      area.addEventListener("blur", () => this.leave());
      area.addEventListener("keydown", (event) => {
        if (event.ctrlKey || event.metaKey || event.altKey) return;
        if (this.key(event.key)) event.preventDefault();
      });
    }
    key(key) {
      const [low, high] = this.view;
      const at = this.at === null ? (low + high) / 2 : this.at;
      if (key === "ArrowLeft" || key === "ArrowRight") { this.step(key === "ArrowLeft" ? -1 : 1); return true; }
      if (key === "Home" || key === "End") { this.point(key === "Home" ? Math.max(low, this.data.ends[0]) : Math.min(high, this.data.ends[1])); return true; }
      if (key === "Escape") { this.leave(); return true; }
      if (!this.group) return false;
      if (key === "0") { this.zoom(null); return true; }
      if (key === "+" || key === "=" || key === "-") {
        const half = (high - low) * (key === "-" ? 1 : 0.25);
        this.zoom([at - half, at + half]);
        return true;
      }
      return false;
    }
    step(by) {
      const xs = [...new Set(this.data.series.flatMap((one) => one.x))].filter((x) => x >= this.view[0] && x <= this.view[1]).sort((a, b) => a - b);
      if (!xs.length) return;
      const now = this.at === null ? (by > 0 ? -1 : xs.length) : nearest(xs, this.at);
      this.point(xs[Math.max(0, Math.min(xs.length - 1, now + by))]);
    }
    point(x) {
      const box = this.area.getBoundingClientRect();
      const across = (x - this.view[0]) / (this.view[1] - this.view[0]);
      this.show(x, box.left + across * box.width, box.top + box.height / 2);
    }
    from(clientX) {
      const box = this.area.getBoundingClientRect();
      const share = Math.max(0, Math.min(1, (clientX - box.left) / box.width));
      return this.view[0] + share * (this.view[1] - this.view[0]);
    }
    to(x) { return (x - this.data.low) / (this.data.high - this.data.low) * width; }
    show(at, clientX, clientY) {
      const found = this.data.series.map((one) => [one, nearest(one.x, at)]);
      const reach = found.map(([one, index]) => one.x[index]).reduce((a, b) => (Math.abs(a - at) <= Math.abs(b - at) ? a : b));
      const name = this.data.names.length ? this.data.names[Math.round(reach)] : `${this.data.x} ${forms[this.data.xform](reach)}`;
      const close = this.data.names.length ? 0.49 : (this.data.high - this.data.low) / 60;
      const lines = found.filter(([one, index]) => Math.abs(one.x[index] - reach) <= close)
        .map(([one, index]) => `${one.name}: ${forms[this.data.form](one.y[index])}`);
      const bands = (this.data.bands || []).filter(([, begin, end]) => begin <= at && at <= end)
        .map(([within, , , value]) => `in ${within}` + (value ? `: ${forms[this.data.form](value)} at most` : ""));
      this.at = reach;
      for (const [key, value] of [["x1", this.to(reach)], ["x2", this.to(reach)], ["visibility", "visible"]]) this.cursor.setAttribute(key, value);
      tip.textContent = [name, ...lines, ...bands].join("\n");
      place(clientX, clientY);
    }
    leave() {
      this.at = null;
      this.cursor.setAttribute("visibility", "hidden");
      hide();
    }
    select(a, b) {
      this.selected.setAttribute("x", this.to(Math.min(a, b)));
      this.selected.setAttribute("width", this.to(Math.max(a, b)) - this.to(Math.min(a, b)));
    }
    zoom(view) { for (const plot of groups.get(this.group) || []) plot.look(view); }
    look(view) {
      const { low, high } = this.data;
      const wanted = view ? [Math.max(low, view[0]), Math.min(high, view[1])] : [low, high];
      if (wanted[1] - wanted[0] < (high - low) / 1e4) return;
      this.view = wanted;
      if (wanted[0] === low && wanted[1] === high) choices.delete(this.key_of("view")); else choices.set(this.key_of("view"), wanted);
      const begin = this.to(wanted[0]);
      this.area.setAttribute("viewBox", `${begin} 0 ${this.to(wanted[1]) - begin} ${this.height}`);
      if (wanted[0] === low && wanted[1] === high) { this.axis.innerHTML = this.words; return; }
      this.axis.textContent = "";
      for (const tick of evenTicks(wanted[0], wanted[1], 5)) {
        const word = document.createElementNS(svgSpace, "text");
        const share = (tick - wanted[0]) / (wanted[1] - wanted[0]);
        word.setAttribute("x", `${100 * share}%`);
        word.setAttribute("y", 14);
        word.setAttribute("text-anchor", share < 0.06 ? "start" : share > 0.94 ? "end" : "middle");
        word.textContent = forms[this.data.xform](Number(tick.toPrecision(6)));
        this.axis.append(word);
      }
    }
  }

  const start = () => {
    groups.clear();
    hide();
    for (const element of document.querySelectorAll(".plot")) new Plot(element);
  };
  start();
  document.addEventListener("mlxflow:drawn", start);
  document.addEventListener("pointerover", (event) => {
    const told = event.target instanceof Element && event.target.closest("[data-title]");
    if (!told) return;
    tip.textContent = told.getAttribute("data-title");
    place(event.clientX, event.clientY);
    told.addEventListener("pointerleave", hide, { once: true });
  });
  document.documentElement.dataset.ready = "yes";
})();
