// Asks the gateway for its state every two seconds and shows it. No framework, nothing from elsewhere.

import { draw } from "./charts.js";

const INTERVAL_MS = 2000;
const KEY = "baton-api-key";
const THEME = "baton-theme";
const THEMES = ["system", "light", "dark"];
const byId = (id) => document.getElementById(id);
let timer;
let receivedAt = 0;

// --- words and numbers

const count = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en-US"));
const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;
const rate = (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en-US"));

function seconds(value) {
  if (value === null) return "–";
  if (value === 0) return "0";
  if (value < 1) return `${(1000 * value).toFixed(value < 0.01 ? 1 : 0)} ms`;
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

function bytes(value) {
  if (value === null) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let index = 0;
  while (value >= 1024 && index < units.length - 1) { value /= 1024; index += 1; }
  return `${index && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[index]}`;
}

// --- small pieces of the page

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function fillTable(table, columns, rows, empty) {
  const head = element("tr");
  for (const column of columns) {
    const cell = element("th", column.title, column.text ? "text" : "");
    cell.scope = "col";
    head.append(cell);
  }
  table.tHead.replaceChildren(head);
  const body = rows.map((row) => {
    const line = element("tr");
    for (const [index, column] of columns.entries()) {
      const value = column.cell(row);
      const cell = element(index ? "td" : "th", undefined, column.className?.(row) ?? (column.text ? "text" : ""));
      if (!index) cell.scope = "row";
      cell.append(value instanceof Node ? value : document.createTextNode(value));
      if (column.hint) cell.title = value;
      if (column.share) cell.style.setProperty("--share", column.share(row));
      line.append(cell);
    }
    return line;
  });
  if (!body.length) {
    const cell = element("td", empty, "empty");
    cell.colSpan = columns.length;
    const line = element("tr");
    line.append(cell);
    body.push(line);
  }
  table.tBodies[0].replaceChildren(...body);
}

function usage(share) {
  const made = document.createElement("span");
  const meter = document.createElement("meter");
  meter.value = share;
  meter.high = 0.9;
  meter.setAttribute("aria-label", "share in use");
  made.append(meter, ` ${percent(share)}`);
  return made;
}

const stateClass = (state) =>
  ({ ready: "text good", away: "text bad", suspect: "text bad", waiting: "text bad" })[state] ?? "text warn";

// --- sections

function showTiles(state) {
  const { totals, history } = state;
  const last = history[history.length - 1];
  const ended = totals.choices.stop + totals.choices.length + totals.choices.error;
  const tiles = [
    ["Within the SLO", ended ? percent(totals.within_slo / ended) : "–", "within-slo"],
    ["TTFT p99", last ? seconds(last.ttft_p99_s) : "–", "ttft"],
    ["ITL p99", last ? seconds(last.itl_p99_s) : "–", "itl"],
    ["Tokens per second", last ? rate(last.tokens) : "–", "tokens"],
    ["In progress", count(totals.running), "running"],
    ["Ended", count(Object.values(totals.choices).reduce((sum, value) => sum + value, 0)), "ended"],
    ["Errors", count(totals.choices.error), "errors"],
    ["Generated tokens", count(totals.generated_tokens), "generated"],
    ["Cached prompt tokens", totals.prompt_tokens ? percent(totals.cached_tokens / totals.prompt_tokens) : "–", "cached"],
    ["Moved requests", count(totals.retries), "retries"],
  ];
  byId("tiles").replaceChildren(
    ...tiles.map(([title, value, name]) => {
      const tile = element("div");
      const text = element("dd", value);
      text.dataset.value = name;
      tile.append(element("dt", title), text);
      return tile;
    }),
  );
}

function showCharts(state) {
  const points = (name) => state.history.map((point) => [point.at, point[name]]);
  const charts = [
    { title: "Time to first token", format: seconds, objective: state.slo.ttft_s,
      series: [{ name: "p50", points: points("ttft_p50_s") }, { name: "p99", points: points("ttft_p99_s") }] },
    { title: "Time between tokens", format: seconds, objective: state.slo.itl_s,
      series: [{ name: "p50", points: points("itl_p50_s") }, { name: "p99", points: points("itl_p99_s") }] },
    { title: "Goodput, choices per second", format: rate,
      series: [{ name: "within the SLO", points: points("goodput") }, { name: "all", points: points("requests") }] },
    { title: "Generated tokens per second", format: rate, series: [{ name: "tokens", points: points("tokens") }] },
  ];
  const host = byId("charts");
  while (host.children.length < charts.length) host.append(element("figure"));
  charts.forEach((chart, index) => draw(host.children[index], chart));
}

// Connected workers, and beside them those of which only the fleet knows: starting, draining, waiting for a next life.
function allWorkers(state) {
  const members = new Map((state.fleet?.members ?? []).map((member) => [member.worker_id, member]));
  const rows = state.workers.map((worker) => {
    const member = members.get(worker.worker);
    members.delete(worker.worker);
    return { ...worker, pid: member?.pid ?? null };
  });
  for (const member of members.values()) {
    const text = member.progress ? `${member.state}: ${member.progress}` : member.state;
    rows.push({ worker: member.worker_id, role: member.role, incarnation: member.incarnation, state: member.state, text,
      pid: member.pid, address: "–" });
  }
  return rows.sort((a, b) => b.role.localeCompare(a.role) || a.worker.localeCompare(b.worker, "en", { numeric: true }));
}

const WORKER_COLUMNS = [
  { title: "Worker", text: true, cell: (w) => w.worker },
  { title: "Role", text: true, cell: (w) => w.role },
  { title: "State", text: true, cell: (w) => w.text ?? w.state, className: (w) => stateClass(w.state) },
  { title: "Life", cell: (w) => count(w.incarnation) },
  { title: "Running", cell: (w) => count(w.running) },
  { title: "Slots", cell: (w) => count(w.slots) },
  { title: "Waiting", cell: (w) => count(w.waiting) },
  { title: "Queued tokens", cell: (w) => count(w.queued_tokens) },
  { title: "KV in use", cell: (w) => (w.kv_usage === undefined ? "–" : usage(w.kv_usage)) },
  { title: "Free pages", cell: (w) => (w.pages ? `${count(w.free_pages)} of ${count(w.pages)}` : "–") },
  { title: "Memory", cell: (w) => (w.memory_used_bytes ? `${bytes(w.memory_used_bytes)} of ${bytes(w.memory_limit_bytes)}` : "–") },
  { title: "Preemptions", cell: (w) => count(w.preemptions) },
  { title: "Late compiles", cell: (w) => count(w.compiles_after_warmup), className: (w) => (w.compiles_after_warmup ? "bad" : "") },
  { title: "Address", text: true, cell: (w) => w.address },
];

function showWorkers(state) {
  const wanted = Object.entries(state.fleet?.wanted ?? {}).map(([role, number]) => `${number} ${role}`);
  byId("wanted").textContent = wanted.length ? `Wanted: ${wanted.join(", ")}` : "";
  fillTable(byId("workers"), WORKER_COLUMNS, allWorkers(state), "No worker is known yet.");
}

const pools = (counts) => Object.entries(counts).map(([role, count]) => `${count} ${role}`).join(", ");

const SCALE_COLUMNS = [
  { title: "When", cell: (d) => new Date(1000 * d.at).toLocaleTimeString() },
  { title: "From", text: true, cell: (d) => pools(d.before) },
  { title: "To", text: true, cell: (d) => pools(d.after) },
  { title: "Done", text: true, cell: (d) => (d.acted ? "yes" : "only advised") },
  { title: "Why", text: true, className: () => "terms", cell: (d) => d.reasons.join("; ") },
];

function showAutoscaler(state) {
  const autoscale = state.fleet?.autoscale;
  byId("autoscale-section").hidden = !autoscale;
  if (!autoscale) return;
  const now = autoscale.waits_for || `it wants ${pools(autoscale.target)}`;
  const held = Object.keys(autoscale.ceilings).length
    ? ` A slice was drained by hand: no more than ${pools(autoscale.ceilings)} until \`baton scale\`.` : "";
  byId("autoscale-now").textContent = `Mode ${autoscale.mode}; ${now}.${held}`;
  fillTable(byId("autoscale"), SCALE_COLUMNS, [...autoscale.decisions].reverse(), "Nothing was decided yet.");
}

function showLinks(state) {
  const decodes = [...new Set(state.links.map((link) => link.decode))].sort();
  const prefills = [...new Set(state.links.map((link) => link.prefill))].sort();
  const most = Math.max(...state.links.map((link) => link.bytes), 1);
  const find = (prefill, decode) => state.links.find((link) => link.prefill === prefill && link.decode === decode);
  const columns = [
    { title: "from \\ to", text: true, cell: (prefill) => prefill },
    ...decodes.map((decode) => ({
      title: decode,
      className: () => "heat",
      share: (prefill) => (find(prefill, decode)?.bytes ?? 0) / most,
      cell: (prefill) => {
        const link = find(prefill, decode);
        if (!link) return "–";
        const speed = link.seconds ? `, ${bytes(link.bytes / link.seconds)}/s` : "";
        const failed = link.failures ? `, ${count(link.failures)} failed` : "";
        return `${bytes(link.bytes)} in ${count(link.transfers)}${speed}${failed}`;
      },
    })),
  ];
  fillTable(byId("links"), columns, prefills, "No KV has been handed over yet.");
}

// What a request was charged with, the largest first; what rounds to nothing is left out.
function terms(all) {
  const felt = Object.entries(all).filter(([, value]) => Math.abs(value) >= 5e-5).sort((a, b) => b[1] - a[1]);
  return felt.map(([name, value]) => `${name.replace(/_s$/, "")} ${seconds(value)}`).join(", ") || "nothing to wait for";
}

const SLOW_COLUMNS = [
  { title: "Request", text: true, hint: true, cell: (s) => s.request_id },
  { title: "Ended", cell: (s) => new Date(1000 * s.at).toLocaleTimeString() },
  { title: "TTFT", cell: (s) => (s.ttft_s === null ? "never" : seconds(s.ttft_s)) },
  { title: "End to end", cell: (s) => seconds(s.e2e_s) },
  { title: "Prompt", cell: (s) => count(s.prompt_tokens) },
  { title: "Cached", cell: (s) => count(s.cached_tokens) },
  { title: "Generated", cell: (s) => count(s.generated_tokens) },
  { title: "Attempts", cell: (s) => count(s.attempts) },
  { title: "End", text: true, cell: (s) => s.reason, className: (s) => (s.reason === "error" ? "text bad" : "text") },
  { title: "Prefill", text: true, cell: (s) => s.prefill ?? "local" },
  { title: "Decode", text: true, cell: (s) => s.decode ?? "–" },
  { title: "Donor", text: true, cell: (s) => s.donor ?? "–" },
  { title: "Placed by", text: true, className: () => "terms", cell: (s) => terms(s.terms ?? {}) },
];

function showEvents(state) {
  const events = [...(state.fleet?.events ?? [])].reverse();
  const items = (events.length ? events : ["Nothing yet."]).map((text) => element("li", text));
  byId("events").replaceChildren(...items);
}

function show(state) {
  document.title = `Baton ${state.model}: ${state.status}`;
  byId("model").textContent = `${state.model}, version ${state.version}`;
  byId("status").textContent = state.status;
  byId("status").className = `pill ${state.status === "ready" ? "good" : "warn"}`;
  byId("main").hidden = false;
  showTiles(state);
  showCharts(state);
  showWorkers(state);
  showAutoscaler(state);
  showLinks(state);
  fillTable(byId("slow"), SLOW_COLUMNS, state.slowest, "No request has ended yet.");
  showEvents(state);
}

// --- asking

function showTrouble(text) {
  byId("trouble").textContent = text;
  byId("trouble").hidden = !text;
  if (text) {
    byId("status").textContent = "not connected";
    byId("status").className = "pill bad";
  }
}

function askForKey(wrong) {
  byId("main").hidden = true;
  byId("key-form").hidden = false;
  byId("key-error").textContent = wrong ? "That key was refused." : "";
  byId("status").textContent = "locked";
  byId("key").focus();
}

async function update() {
  clearTimeout(timer);
  const key = sessionStorage.getItem(KEY);
  try {
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    const reply = await fetch("dashboard/state", { headers, signal: AbortSignal.timeout(5000) });
    if (reply.status === 401) {
      sessionStorage.removeItem(KEY);
      askForKey(Boolean(key));
      return;
    }
    if (!reply.ok) throw new Error(`it answers with status ${reply.status}`);
    show(await reply.json());
    receivedAt = Date.now();
    byId("key-form").hidden = true;
    showTrouble("");
  } catch (error) {
    showTrouble(`The gateway cannot be reached (${error.message}). Trying again; what you see may be old.`);
  }
  showAge();
  timer = setTimeout(update, INTERVAL_MS);
}

function showAge() {
  if (!receivedAt) return;
  const age = Math.round((Date.now() - receivedAt) / 1000);
  byId("updated").textContent = age < 3 ? `updated ${new Date(receivedAt).toLocaleTimeString()}` : `${age} s old`;
}

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
  localStorage.setItem(THEME, theme);
}

byId("theme").addEventListener("click", () => {
  const now = localStorage.getItem(THEME) ?? "system";
  setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value);
  byId("key").value = "";
  update();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && byId("key-form").hidden) update(); });
setInterval(showAge, 1000);
setTheme(THEMES.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "system");
update();
