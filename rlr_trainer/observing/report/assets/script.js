"use strict";
/* Two conveniences; the page says everything without them: a read-out under the pointer, and open details in print. */
(() => {
  const read = (text) => text.trim().split(/\s+/).map(Number);
  const show = (value) => {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size < 1e-3 || size >= 1e7) return value.toExponential(2);
    return value.toLocaleString("en", { maximumSignificantDigits: size >= 1000 ? 6 : 3 });
  };
  const tip = document.createElement("output");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const nodes = (line) =>
    line.tagName === "polyline"
      ? line.getAttribute("points").trim().split(/\s+/).map((pair) => pair.split(",").map(Number))
      : (line.getAttribute("d").match(/M[-\d.]+ [-\d.]+/g) || []).map((move) => read(move.slice(1)));
  for (const chart of document.querySelectorAll("svg[data-box]")) {
    const [left, right, top, bottom] = read(chart.dataset.box);
    const [x0, x1] = read(chart.dataset.x);
    const [y0, y1] = read(chart.dataset.y);
    const lines = [...chart.querySelectorAll("[data-label]")].map((line) => [line.dataset.label, nodes(line)]);
    const rule = document.createElementNS("http://www.w3.org/2000/svg", "path");
    rule.setAttribute("class", "rule");
    const hide = () => { tip.hidden = true; rule.remove(); };
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("pointermove", (event) => {
      const frame = chart.getBoundingClientRect();
      const scale = chart.viewBox.baseVal.width / frame.width;
      const x = (event.clientX - frame.left) * scale;
      if (x < left - 4 || x > right + 4) return hide();
      let at = null;
      const found = [];
      for (const [label, points] of lines) {
        if (!points.length) continue;
        const near = points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
        if (Math.abs(near[0] - x) > 40) continue;
        const y = y0 + ((bottom - near[1]) / (bottom - top)) * (y1 - y0);
        found.push((label ? label + ": " : "") + show(chart.dataset.kind === "log" ? 10 ** y : y));
        if (at === null || Math.abs(near[0] - x) < Math.abs(at - x)) at = near[0];
      }
      if (at === null) return hide();
      rule.setAttribute("d", `M${at} ${top}V${bottom}`);
      chart.append(rule);
      const name = chart.querySelector(".label").textContent;
      tip.textContent = `${name} ${show(x0 + ((at - left) / (right - left)) * (x1 - x0))}\n${found.join("\n")}`;
      tip.hidden = false;
      const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
      tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, room)) + scrollX}px`;
      tip.style.top = `${event.clientY + 16 + scrollY}px`;
    });
  }
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
})();
