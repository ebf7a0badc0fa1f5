"use strict";
// Pictures of a device: stacked memory over time, and one bar for an instance.

const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 8;

function shape(parent, kind, attributes, text) {
  const made = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function colourOf(index) {
  return `var(--c${index % COLOURS})`;
}

// An instance keeps the colour in which it was first seen.
class Palette {
  constructor() {
    this.order = new Map();
  }
  index(instance) {
    if (!this.order.has(instance)) this.order.set(instance, this.order.size);
    return this.order.get(instance);
  }
}

// samples: {time_s, devices: {name: {capacity, foreign, charges}}}; marks: events of this device.
function drawChart(svg, device, samples, marks, palette, span_s) {
  const box = svg.getBoundingClientRect();
  const width = Math.max(200, box.width), height = Math.max(100, box.height);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const seen = samples.filter((sample) => device in sample.devices);
  if (!seen.length) return;
  const end_s = seen[seen.length - 1].time_s;
  const top = Math.max(...seen.map((sample) => total(sample.devices[device]))) * 1.06;
  const x = (time_s) => width * (1 - (end_s - time_s) / span_s);
  const y = (size) => height * (1 - size / top);
  const shown = seen.filter((sample) => x(sample.time_s) >= -width);
  const instances = [...new Set(shown.flatMap((s) => Object.keys(s.devices[device].charges)))];
  instances.sort((a, b) => palette.index(a) - palette.index(b));
  const base = new Array(shown.length).fill(0);
  const layer = (sizes, attributes) => {
    const upper = [], lower = [];
    shown.forEach((sample, i) => {
      const at = x(sample.time_s).toFixed(1);
      lower.push(`${at},${y(base[i]).toFixed(1)}`);
      base[i] += sizes[i];
      upper.push(`${at},${y(base[i]).toFixed(1)}`);
    });
    shape(svg, "polygon", { points: [...upper, ...lower.reverse()].join(" "), ...attributes });
  };
  const foreign = shown.map((sample) => sample.devices[device].foreign);
  if (foreign.some((size) => size > 0)) layer(foreign, { class: "foreign" });
  for (const instance of instances) {
    const sizes = shown.map((sample) => sample.devices[device].charges[instance] || 0);
    layer(sizes, { class: "layer", "data-instance": instance,
                   fill: colourOf(palette.index(instance)) });
  }
  const steps = shown.map((sample) =>
    `${x(sample.time_s).toFixed(1)},${y(sample.devices[device].capacity).toFixed(1)}`);
  shape(svg, "polyline", { points: steps.join(" "), class: "capacity", fill: "none" });
  for (const mark of marks) {
    const at = x(mark.time_s);
    if (at < 0) continue;
    const triangle = shape(svg, "path", { class: "mark", "data-event": mark.event,
      d: `M${(at - 4).toFixed(1)} 0h8l-4 8z` });
    shape(triangle, "title", {}, mark.text);
  }
  shape(svg, "text", { x: 6, y: height - 6 }, `${Math.round(span_s)} s ago`);
  const last = seen[seen.length - 1].devices[device];
  shape(svg, "text", { x: 6, y: y(last.capacity) + 14 }, `capacity ${sizeText(last.capacity)}`);
}

function total(device) {
  const charged = Object.values(device.charges).reduce((sum, size) => sum + size, 0);
  return Math.max(device.capacity, charged + device.foreign, 1);
}

// In use, cached and warm, and what it demands beyond (an empty frame), under the limit (a line) and
// over the guarantee (a dashed frame).
function drawBar(svg, account, capacity, colour) {
  svg.setAttribute("viewBox", "0 0 1000 20");
  svg.replaceChildren();
  const scale = (size) => (1000 * size) / Math.max(capacity, 1);
  let from = 0;
  for (const state of ["in_use", "cached", "warm"]) {
    const width = scale(account[state]);
    shape(svg, "rect", { class: state, x: from.toFixed(2), y: 3, width: width.toFixed(2),
                         height: 14, fill: colour });
    from += width;
  }
  if (account.demand > 0) {
    shape(svg, "rect", { class: "demand", x: (from + 1).toFixed(2), y: 4, height: 12,
                         width: Math.max(3, scale(account.demand) - 2).toFixed(2) });
  }
  if (account.guarantee > 0) {
    shape(svg, "rect", { class: "guarantee", x: 1, y: 1, height: 18,
                         width: Math.max(0, scale(account.guarantee) - 2).toFixed(2) });
  }
  if (account.limit !== null) {
    const at = Math.min(scale(account.limit), 997);
    shape(svg, "rect", { class: "limit", x: at.toFixed(2), y: 0, width: 3, height: 20 });
  }
}

// As Python rounds, so that all tools show the same: a half goes to the even neighbour.
function tenths(value) {
  const rounded = Math.round(value * 10);
  const half = Math.abs((value * 10) % 1) === 0.5;
  return (half && rounded % 2 !== 0 ? rounded - 1 : rounded) / 10;
}

function sizeText(bytes) {
  let value = bytes;
  for (const unit of ["B", "KiB", "MiB", "GiB", "TiB"]) {
    if (Math.abs(value) < 1024 || unit === "TiB") {
      return `${tenths(value).toFixed(1).replace(/\.0$/, "")} ${unit}`;
    }
    value /= 1024;
  }
  return "";
}
