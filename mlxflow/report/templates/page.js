"use strict";
(() => {
  const tip = document.getElementById("tip");
  const svgSpace = "http://www.w3.org/2000/svg";
  const width = 1000;
  const groups = new Map();

  const significant = (value) => {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en-US");
    if (size >= 1000) return Math.round(value).toLocaleString("en-US");
    return size < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };
  const bytes = (value) => {
    const units = ["B", "KB", "MB", "GB", "TB", "PB"];
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
      this.group = element.dataset.group || "";
      if (this.group) groups.set(this.group, [...(groups.get(this.group) || []), this]);
      this.listen();
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
      if (key === "Home" || key === "End") { this.point(key === "Home" ? low : high); return true; }
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
      const begin = this.to(wanted[0]);
      this.area.setAttribute("viewBox", `${begin} 0 ${this.to(wanted[1]) - begin} ${this.height}`);
      if (wanted[0] === low && wanted[1] === high) { this.axis.innerHTML = this.words; return; }
      this.axis.textContent = "";
      const raw = (wanted[1] - wanted[0]) / 5;
      const power = 10 ** Math.floor(Math.log10(raw));
      const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
      for (let tick = Math.ceil(wanted[0] / step) * step; tick <= wanted[1]; tick += step) {
        const word = document.createElementNS(svgSpace, "text");
        const share = (tick - wanted[0]) / (wanted[1] - wanted[0]);
        word.setAttribute("x", `${100 * share}%`);
        word.setAttribute("y", 14);
        word.setAttribute("text-anchor", share < 0.04 ? "start" : share > 0.96 ? "end" : "middle");
        word.textContent = forms[this.data.xform](Number(tick.toPrecision(6)));
        this.axis.append(word);
      }
    }
  }

  for (const element of document.querySelectorAll(".plot")) new Plot(element);
  document.addEventListener("pointerover", (event) => {
    const told = event.target instanceof Element && event.target.closest("[data-title]");
    if (!told) return;
    tip.textContent = told.getAttribute("data-title");
    place(event.clientX, event.clientY);
    told.addEventListener("pointerleave", hide, { once: true });
  });
  document.documentElement.dataset.ready = "yes";
})();
