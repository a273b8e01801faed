"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const rows = report.parameters;
const info = document.getElementById("info");

// Names come from files: what would not be seen, or would turn the text around, is shown by its number.
const plain = (text) => text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (found) => `\\u{${found.codePointAt(0).toString(16)}}`);

function size(bytes) {
  let value = bytes;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 1000) return `${unit === "B" ? value : value.toFixed(1)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(2)} TB`;
}

const range = ([start, stop]) => `${start}–${stop - 1}`;

const span = (word, start, stop) => (stop - start === 1 ? `${word} ${start}` : `${word}s ${start}–${stop - 1}`);

// What a rank holds of a row, in words.
function part(row, rank) {
  if (row.boxes) return row.boxes[rank].map((box) => box.map(range).join(" × ")).slice(0, 4).join("; ") || "nothing";
  if (!row.cuts.length) return "all of it";
  return row.cuts.map((cut) => {
    const times = new Map();
    for (const one of cut.ranges[rank]) times.set(range(one), (times.get(range(one)) || 0) + 1);
    const held = [...times].map(([words, count]) => (count > 1 ? `${words} (${count} times)` : words));
    if (!held.length) return "nothing";
    let words = `${held.slice(0, 4).join(", ")}${held.length > 4 ? " …" : ""} of dim ${cut.dim}`;
    const unit = row.heads && row.cuts.length === 1 ? row.shape[cut.dim] / row.heads : 0;
    const [start, stop] = cut.ranges[rank][0].map((at) => at / unit);
    if (held.length === 1 && Number.isInteger(start) && Number.isInteger(stop))
      words += ` (${span("head", start, stop)} of ${row.heads})`;
    return words;
  }).join(", ");
}

function show(row, ranks) {
  const title = document.createElement("b");
  title.textContent = plain(row.parameter);
  const form = [row.shape.join(" × ") || "scalar", row.dtype];
  if (row.quantized) form.push(`${row.quantized.format}, in units of ${row.quantized.unit.join(" × ")}`);
  if (row.count > 1) form.push(`${row.count} of them`);
  form.push(`${size(row.bytes)} each`, row.placement, row.reason || row.style || "no style");
  const lines = [form.join(" · ")];
  if (ranks.length === rows[0].rank_bytes.length && ranks.length > 1) lines.push(`every rank holds all of it: ${size(row.rank_bytes[0])} in each file`);
  else for (const rank of ranks.slice(0, 4)) lines.push(`rank ${rank} holds ${part(row, rank)}: ${size(row.rank_bytes[rank])} in all`);
  if (ranks.length > 4 && ranks.length < rows[0].rank_bytes.length) lines.push(`and ${ranks.length - 4} more ranks`);
  info.replaceChildren(title, ...lines.flatMap((line, at) => (at ? [document.createElement("br"), plain(line)] : [plain(line)])));
  info.hidden = false;
}

function pick(svg, cell) {
  for (const old of document.querySelectorAll(".picked")) old.classList.remove("picked");
  const row = rows[svg.dataset.p];
  const ranks = cell && cell.dataset.r ? cell.dataset.r.split(" ").map(Number) : [];
  if (cell) cell.classList.add("picked");
  show(row, ranks);
}

for (const svg of document.querySelectorAll("figure svg")) {
  const cells = [...svg.querySelectorAll("[data-r]")];
  let at = -1;
  const over = (event) => pick(svg, event.target.closest("[data-r]"));
  svg.addEventListener("pointerover", over);
  svg.addEventListener("click", over);
  svg.addEventListener("focus", () => pick(svg, cells[at] || (cells.length === 1 ? cells[0] : null)));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || !cells.length) return;
    event.preventDefault();
    at = at < 0 ? (step > 0 ? 0 : cells.length - 1) : (at + step + cells.length) % cells.length;
    pick(svg, cells[at]);
  });
}

addEventListener("keydown", (event) => {
  if (event.key === "Escape") info.hidden = true;
});

const buttons = [...document.querySelectorAll("[data-rank]")];
for (const button of buttons) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    for (const other of buttons) other.setAttribute("aria-pressed", String(on && other === button));
    for (const cell of document.querySelectorAll("figure [data-r]"))
      cell.classList.toggle("off", on && !cell.dataset.r.split(" ").includes(button.dataset.rank));
  });
}

const search = document.getElementById("search");
const lines = [...document.querySelectorAll("tbody tr")];
search.addEventListener("input", () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let found = 0;
  for (const line of lines) {
    const text = line.textContent.toLowerCase();
    line.hidden = !words.every((word) => text.includes(word));
    found += !line.hidden;
  }
  document.getElementById("count").textContent = `${found} of ${lines.length}`;
});
