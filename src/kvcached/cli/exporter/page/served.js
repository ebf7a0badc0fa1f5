"use strict";
// The models of a `kvcached serve`, their states and queues. Names are only ever set as text.

function showServed(serve) {
  const section = document.getElementById("served");
  section.hidden = !serve;
  if (!serve) return;
  section.querySelector("h2").textContent = serve.url;
  section.querySelector(".problem").textContent = serve.problem;
  section.querySelector("table").hidden = serve.problem !== "";
  const body = section.querySelector("tbody");
  const rows = new Map([...body.children].map((row) => [row.dataset.model, row]));
  for (const model of serve.models) {
    let row = rows.get(model.name);
    rows.delete(model.name);
    if (!row) {
      const template = document.getElementById("model-template");
      row = template.content.firstElementChild.cloneNode(true);
      row.dataset.model = model.name;
      body.append(row);
    }
    showModel(row, model);
  }
  for (const row of rows.values()) row.remove();
}

function showModel(row, model) {
  row.querySelector(".name").textContent = model.name;
  row.querySelector(".state").textContent = model.state;
  for (const count of ["waiting", "running", "admitted"]) {
    row.querySelector(`.${count}`).textContent = model[count];
  }
  row.querySelector(".waiting").classList.toggle("some", model.waiting > 0);
  row.querySelector(".prefill").textContent = `${(1000 * model.prefill_1000_tokens_s).toFixed(0)} ms`;
  row.querySelector(".short").textContent = model.short_of_memory ? "short" : "";
}
