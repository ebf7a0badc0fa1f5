"use strict";
// Asks the exporter for what is new, and shows it. Names are only ever set as text.

const SPAN_S = 300;
const EVENTS_SHOWN = 200;
const MARKED = ["reclaim"];

const state = { sequence: 0, samples: [], events: [], palette: new Palette(), canChange: false };
const byId = (id) => document.getElementById(id);

async function poll() {
  let wait_s = 1;
  try {
    const reply = await fetch(`/api/v1/state?after=${state.sequence}`);
    if (!reply.ok) throw new Error(`status ${reply.status}`);
    const news = await reply.json();
    if (news.sequence < state.sequence) {  // another exporter: begin anew
      state.sequence = 0;
      state.samples = [];
      state.events = [];
    } else {
      take(news);
    }
    wait_s = Math.min(5, Math.max(0.1, news.interval_s));
    const count = news.devices.length;
    say(`${count} ${count === 1 ? "device" : "devices"}, ${new Date().toLocaleTimeString()}`, false);
  } catch (error) {
    say(`no answer from the exporter (${error.message})`, true);
  }
  setTimeout(poll, wait_s * 1000);
}

function say(text, lost) {
  byId("status").textContent = text;
  byId("status").classList.toggle("lost", lost);
}

function take(news) {
  state.sequence = news.sequence;
  state.canChange = news.can_change;
  byId("token-form").hidden = !news.can_change;
  showServed(news.serve);
  state.samples.push(...news.samples);
  const now_s = state.samples.length ? state.samples[state.samples.length - 1].time_s : 0;
  state.samples = state.samples.filter((sample) => now_s - sample.time_s <= SPAN_S);
  state.events.push(...news.events);
  state.events = state.events.slice(-1000);
  showDevices(news.devices);
  if (news.events.length || !byId("events").children.length) showEvents();
}

function showDevices(devices) {
  const main = byId("devices");
  const there = new Map([...main.children].map((section) => [section.dataset.device, section]));
  for (const device of devices) {
    let section = there.get(device.device);
    there.delete(device.device);
    if (!section) {
      section = byId("device-template").content.firstElementChild.cloneNode(true);
      section.dataset.device = device.device;
      main.append(section);
    }
    showDevice(section, device);
  }
  for (const section of there.values()) section.remove();
}

function showDevice(section, device) {
  section.querySelector("h2").textContent = device.device;
  const sums = [`capacity ${sizeText(device.capacity)}`, `free ${sizeText(device.free)}`];
  if (device.headroom) sums.push(`headroom ${sizeText(device.headroom)}`);
  if (device.foreign) sums.push(`other programs ${sizeText(device.foreign)}`);
  if (device.set_aside) sums.push(`set aside ${sizeText(device.set_aside)}`);
  section.querySelector(".sums").textContent = sums.join(" · ");
  const marks = state.events.filter(
    (event) => event.device === device.device && MARKED.includes(event.event));
  const span_s = Math.max(30, Math.min(SPAN_S, age_s()));
  drawChart(section.querySelector(".chart"), device.device, state.samples, marks, state.palette,
            span_s);
  const body = section.querySelector("tbody");
  const rows = new Map([...body.children].map((row) => [row.dataset.instance, row]));
  for (const account of device.accounts) {
    let row = rows.get(account.instance);
    rows.delete(account.instance);
    if (!row) row = addRow(body, device.device, account.instance);
    showRow(row, account, device.capacity);
  }
  for (const row of rows.values()) row.remove();
}

function age_s() {
  const all = state.samples;
  return all.length ? all[all.length - 1].time_s - all[0].time_s : 0;
}

function addRow(body, device, instance) {
  const row = byId("row-template").content.firstElementChild.cloneNode(true);
  row.dataset.instance = instance;
  row.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    setLimit(device, instance, event.target.querySelector("input"));
  });
  body.append(row);
  return row;
}

function showRow(row, account, capacity) {
  const colour = colourOf(state.palette.index(account.instance));
  row.querySelector(".key").style.background = colour;
  row.querySelector(".name").textContent = account.name;
  row.classList.toggle("dead", !account.alive);
  row.querySelector(".state").textContent =
    !account.alive ? "dead" : account.ready ? "" : "not serving";
  drawBar(row.querySelector(".bar"), account, capacity, colour);
  const sizes = ["charge", "in_use", "cached", "warm", "demand", "guarantee", "reclaimed"];
  for (const size of sizes) row.querySelector(`td.${size}`).textContent = sizeText(account[size]);
  row.querySelector("td.demand").classList.toggle("some", account.demand > 0);
  const limit = row.querySelector("td.limit .value");
  limit.textContent = account.limit === null ? "none" : sizeText(account.limit);
  limit.classList.toggle("over", account.above > 0);
  row.querySelector("td.refused").textContent = account.refused;
  const asked = account.hits + account.misses;
  row.querySelector("td.hits").textContent = asked ? `${Math.round(100 * account.hits / asked)}%` : "";
  row.querySelector("td.limit form").hidden = !state.canChange;
}

function showEvents() {
  const lines = state.events.slice(-EVENTS_SHOWN).reverse().map((event) => {
    const line = document.createElement("li");
    line.textContent = `${new Date(event.time_s * 1000).toLocaleTimeString()}  ${event.text}`;
    return line;
  });
  byId("events").replaceChildren(...lines);
}

async function setLimit(device, instance, field) {
  const text = field.value.trim();
  if (!text) return;
  const limit = text.toLowerCase() === "none" ? null : text;
  const reply = await fetch("/api/v1/limit", {
    method: "POST",
    headers: { Authorization: `Bearer ${byId("token").value.trim()}` },
    body: JSON.stringify({ device, instance, limit }),
  });
  const said = await reply.json();
  if (reply.ok) field.value = "";
  field.setCustomValidity(reply.ok ? "" : said.error);
  field.reportValidity();
  field.addEventListener("input", () => field.setCustomValidity(""), { once: true });
}

byId("token-form").addEventListener("submit", (event) => event.preventDefault());
poll();
