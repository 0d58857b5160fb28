// Line charts as SVG: one or two series over time, an axis, the objective where there is one.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 150, LEFT = 48, RIGHT = 8, TOP = 8, BOTTOM = 20;

function node(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// The smallest of 1, 2, 5 times a power of ten that is at least `value`.
export function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  for (const step of [1, 2, 5, 10]) if (value <= step * power * 1.0000001) return step * power;
  return 10 * power;
}

// Stretches of points that have a value, as SVG paths: a gap in the data is a gap in the line.
function paths(points, x, y) {
  const found = [];
  let current = "";
  for (const [at, value] of points) {
    if (value === null) { if (current) found.push(current); current = ""; continue; }
    current += `${current ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
  }
  if (current) found.push(current);
  return found;
}

// chart: {title, series: [{name, points: [[seconds, value or null]]}], objective, format}
export function draw(figure, chart) {
  const width = Math.max(figure.clientWidth - 30, 240);  // in pixels, so that text is not stretched
  const all = chart.series.flatMap((series) => series.points);
  const values = all.map(([, value]) => value).filter((value) => value !== null);
  const top = roundUp(Math.max(...values, chart.objective ?? 0, 0));
  const times = all.map(([at]) => at);
  const end = Math.max(...times, 1), begin = Math.min(...times, end - 60);
  const x = (at) => LEFT + ((at - begin) / (end - begin)) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - TOP - BOTTOM);
  const latest = chart.series.map(({ name, points }) => {
    const value = points.length ? points[points.length - 1][1] : null;
    return `${name} ${value === null ? "no data" : chart.format(value)}`;
  });
  const svg = node("svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`, role: "img",
    "aria-label": `${chart.title}: ${latest.join(", ")}`,
  });
  for (const part of [0, 0.5, 1]) {
    const level = y(top * part);
    svg.append(node("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: level, y2: level }));
    svg.append(node("text", { x: LEFT - 6, y: level + 4, "text-anchor": "end" }, chart.format(top * part)));
  }
  if (chart.objective !== undefined) {
    const level = y(chart.objective);
    svg.append(node("line", { class: "slo", x1: LEFT, x2: width - RIGHT, y1: level, y2: level }));
  }
  const minutes = Math.max(1, Math.round((end - begin) / 60));
  svg.append(node("text", { x: LEFT, y: HEIGHT - 4 }, `${minutes} min ago`));
  svg.append(node("text", { x: width - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, "now"));
  chart.series.forEach(({ points }, index) => {
    for (const d of paths(points, x, y)) svg.append(node("path", { class: index ? "line-b" : "line-a", d }));
  });
  const caption = document.createElement("figcaption");
  const title = document.createElement("b");
  title.textContent = chart.title;
  caption.append(title);
  latest.forEach((text, index) => {
    const key = document.createElement("span");
    key.className = index ? "key-b" : "key-a";
    key.textContent = text;
    caption.append(key);
  });
  if (chart.objective !== undefined) {
    const objective = document.createElement("span");
    objective.textContent = `objective ${chart.format(chart.objective)}`;
    caption.append(objective);
  }
  figure.replaceChildren(caption, svg);
}
