// SPDX-License-Identifier: Apache-2.0
// Shows /flows.json, again and again. All that comes from there is set as text, never as markup.
"use strict";

const REFRESH = 2000, MOST_WORKLOADS = 12, MOST_HOSTS = 12;
const byId = (id) => document.getElementById(id);
let shown = null;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(name, attributes = {}, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function scaled(value, units, step) {
  let unit = 0;
  while (value >= step && unit + 1 < units.length) { value /= step; unit += 1; }
  return (unit && value < 100 ? value.toFixed(1) : Math.round(value)) + " " + units[unit];
}
const bytes = (count) => scaled(count, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"], 1024);
const rate = (perSecond) => perSecond ? scaled(perSecond * 8, ["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"], 1000) : "–";
const count = (number) => number.toLocaleString("en");
const connections = (sum) => sum.on_overlay + sum.on_host + sum.moving;
const carried = (sum) => sum.overlay_bytes_per_second + sum.host_bytes_per_second;
const share = (part, whole) => whole ? Math.round(100 * part / whole) : 0;
const hostOf = (other) => other === "same" ? "this host" : other === "unknown" ? "elsewhere" : other.peer;
const age = (ms) => ms < 120e3 ? Math.round(ms / 1e3) + " s" : ms < 7200e3 ? Math.round(ms / 60e3) + " min" : Math.round(ms / 3600e3) + " h";

function meter(part, whole) {
  const bar = element("i");
  bar.style.width = share(part, whole) + "%";
  return element("div", { class: whole ? "meter" : "meter none", title: share(part, whole) + " % on the host network" }, bar);
}

function tile(value, label, ...more) {
  return element("div", { class: "tile" }, element("b", {}, value), element("span", {}, label), ...more);
}

function showTiles({ sum, saved_bytes, status }) {
  const all = connections(sum), peers = Object.values(status.peers);
  byId("tiles").replaceChildren(
    tile(`${share(sum.on_host, all)} %`, `on the host network: ${count(sum.on_host)} of ${count(all)} connections`, meter(sum.on_host, all)),
    tile(rate(sum.host_bytes_per_second), "over the host network now"),
    tile(rate(sum.overlay_bytes_per_second), "over the overlay now"),
    tile(bytes(sum.host_bytes), `carried by the host network; VXLAN headers not sent: ${bytes(saved_bytes)} at least`),
    tile(`${peers.filter(Boolean).length} of ${peers.length}`, "peer routers reached"),
  );
}

function table(id, heads, rows) {
  const head = element("tr", {}, ...heads.map(([name, kind]) => element("th", { class: kind || "" }, name)));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell, at) =>
    element("td", { class: heads[at][1] || "" }, cell))));
  byId(id).replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
}

function showGroups({ groups, more_groups }) {
  table("groups",
    [["workload"], ["with host"], ["connections", "number"], ["on host network"], ["host network", "number"], ["overlay", "number"], ["carried by host network", "number"]],
    groups.map((group) => [
      group.workload || "?", hostOf(group.other_host), count(connections(group)), meter(group.on_host, connections(group)),
      rate(group.host_bytes_per_second), rate(group.overlay_bytes_per_second), bytes(group.host_bytes),
    ]));
  const more = connections(more_groups);
  byId("more-groups").textContent = more ? `and ${count(more)} connections of workloads that carry less` : "";
}

function showFlows({ flows, more_flows }) {
  const words = byId("filter").value.toLowerCase();
  const holds = (flow) => !words || [flow.workload, flow.conn, flow.local, flow.remote, flow.path, flow.reason || "", hostOf(flow.other_host)]
    .some((text) => text.toLowerCase().includes(words));
  const kept = flows.filter(holds);
  table("flows",
    [["workload"], ["local"], ["remote"], ["path"], ["rate", "number"], ["carried", "number"], ["age", "number"], ["pause", "number"], ["why", "wide"]],
    kept.map((flow) => [
      flow.workload || "?", element("code", { title: flow.conn }, flow.local), element("code", {}, flow.remote),
      element("span", { class: "path " + flow.path }, flow.path),
      rate(flow.overlay_bytes_per_second + flow.host_bytes_per_second), bytes(flow.overlay_bytes + flow.host_bytes),
      age(flow.age_ms), flow.pause_us === null ? "–" : (flow.pause_us / 1000).toFixed(1) + " ms", flow.reason_text || "",
    ]));
  byId("more-flows").textContent =
    (words ? `${count(kept.length)} of the ${count(flows.length)} shown; ` : "") + (more_flows ? `${count(more_flows)} that carry less are not shown` : words ? "no others" : "");
}

function showRefused({ status }) {
  const reasons = Object.entries(status.refused).sort((one, other) => other[1] - one[1]);
  const items = reasons.map(([reason, times]) => element("li", {}, element("b", {}, count(times)), reason.replaceAll("_", " ")));
  byId("refused").replaceChildren(...(items.length ? items : [element("li", {}, "nothing")]));
}

// The first ones by connections; the others as one.
function columns(groups) {
  const column = (nameOf, most, rest) => {
    const sums = new Map();
    for (const group of groups) {
      const name = nameOf(group);
      const sum = sums.get(name) || { on_host: 0, on_overlay: 0 };
      sum.on_host += group.on_host; sum.on_overlay += group.on_overlay + group.moving;
      sums.set(name, sum);
    }
    const names = [...sums].sort((one, other) => other[1].on_host + other[1].on_overlay - one[1].on_host - one[1].on_overlay);
    const first = names.length > most ? names.slice(0, most - 1) : names;
    if (names.length > most) {
      const others = { on_host: 0, on_overlay: 0 };
      for (const [, sum] of names.slice(most - 1)) { others.on_host += sum.on_host; others.on_overlay += sum.on_overlay; }
      first.push([`${names.length - most + 1} other ${rest}`, others]);
    }
    const place = new Map(names.map(([name], at) => [name, Math.min(at, first.length - 1)]));
    return { nodes: first, of: (group) => place.get(nameOf(group)) };
  };
  return [
    column((group) => group.workload || "?", MOST_WORKLOADS, "workloads"),
    column((group) => hostOf(group.other_host), MOST_HOSTS, "hosts"),
  ];
}

function cut(text, width) {
  const most = Math.max(4, Math.floor(width / 7.6));
  return text.length > most ? "…" + text.slice(1 - most) : text;
}

function showMap({ host, groups, status }) {
  const width = Math.max(300, byId("map").clientWidth), node = Math.min(230, width * 0.36), row = 54, tall = 42, top = 24;
  const [left, right] = columns(groups);
  const rows = Math.max(left.nodes.length, right.nodes.length, 1);
  const height = top + rows * row;
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "Workloads of this host, the hosts that they are connected to, and the paths between them" });
  const y = (column, at) => top + (at + 0.5) * (height - top) / column.nodes.length;

  const lines = new Map();
  for (const group of groups) {
    const [from, to] = [left.of(group), right.of(group)];
    for (const [path, number, speed] of [["host", group.on_host, group.host_bytes_per_second], ["overlay", group.on_overlay + group.moving, group.overlay_bytes_per_second]]) {
      if (!number) continue;
      const key = `${from} ${to} ${path}`;
      const line = lines.get(key) || { from, to, path, number: 0, speed: 0 };
      line.number += number; line.speed += speed;
      lines.set(key, line);
    }
  }
  const most = Math.max(1, ...[...lines.values()].map((line) => line.number));
  // Beside each other where they meet, in the order of their other ends.
  const slots = (side, column, other, otherColumn) => {
    for (let at = 0; at < column.nodes.length; at += 1) {
      const here = [...lines.values()].filter((line) => line[side] === at);
      here.sort((one, two) => y(otherColumn, one[other]) - y(otherColumn, two[other]) || (one.path < two.path ? -1 : 1));
      const apart = Math.min(11, (tall - 10) / Math.max(1, here.length - 1));
      here.forEach((line, slot) => { line[side + "Y"] = y(column, at) + (slot - (here.length - 1) / 2) * apart; });
    }
  };
  slots("from", left, "to", right);
  slots("to", right, "from", left);
  for (const line of lines.values()) {
    const [x1, y1, x2, y2] = [node, line.fromY, width - node, line.toY];
    const bend = (x2 - x1) / 2;
    const d = `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`;
    const path = drawn("path", { d, class: line.path, "stroke-width": 2 + 8 * Math.sqrt(line.number / most) });
    path.append(drawn("title", {}, `${count(line.number)} connections on the ${line.path === "host" ? "host network" : "overlay"}, ${rate(line.speed)}`));
    svg.append(path);
    if (line.speed) svg.append(drawn("path", { d, class: "flows" }));
  }
  svg.append(drawn("text", { x: 0, y: 12, class: "soft" }, `this host, ${host}`));
  svg.append(drawn("text", { x: width, y: 12, class: "soft", "text-anchor": "end" }, "other ends"));
  const box = (column, x, [name, sum], at, down) => {
    const middle = y(column, at);
    svg.append(drawn("rect", { x, y: middle - tall / 2, width: node, height: tall, rx: 9, class: down ? "down" : "" }));
    const label = drawn("text", { x: x + 12, y: middle - 3 }, cut(name, node - 24));
    label.append(drawn("title", {}, name));
    svg.append(label);
    const words = down ? "router not reached" : `${count(sum.on_host)} host, ${count(sum.on_overlay)} overlay`;
    svg.append(drawn("text", { x: x + 12, y: middle + 14, class: "soft" }, cut(words, node - 18)));
  };
  left.nodes.forEach((one, at) => box(left, 0.5, one, at, false));
  right.nodes.forEach((one, at) => box(right, width - node - 0.5, one, at, status.peers[one[0]] === false));
  if (!groups.length) svg.append(drawn("text", { x: width / 2, y: height / 2 + 10, "text-anchor": "middle", class: "soft" }, "no connections yet"));
  byId("map").replaceChildren(svg);
}

function show() {
  if (!shown) return;
  byId("host").textContent = shown.host;
  byId("foot").textContent = `router ${shown.status.version}; this page only shows, and asks the router every ${REFRESH / 1000} s`;
  showTiles(shown); showMap(shown); showGroups(shown); showFlows(shown); showRefused(shown);
}

function say(text, bad) {
  byId("state").textContent = text;
  byId("state").className = bad ? "bad" : "";
}

async function refresh() {
  if (document.hidden && shown) return;
  try {
    const answer = await fetch("/flows.json");
    if (!answer.ok) throw new Error(await answer.text());
    shown = await answer.json();
    const { forwarder, rules, swaps, swap_backs } = shown.status;
    const moves = `${count(swaps)} swaps, ${count(swap_backs)} swap backs, ${count(rules)} rules`;
    if (forwarder === null) say("the forwarder is not reached: nothing is swapped", true);
    else say(`${moves}; ${new Date().toLocaleTimeString()}`, false);
    show();
  } catch (error) {
    say(`what is shown is old: ${error.message}`, true);
  }
}

async function refreshForEver() {
  await refresh();
  setTimeout(refreshForEver, REFRESH);
}

byId("filter").addEventListener("input", () => shown && showFlows(shown));
addEventListener("resize", show);
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
refreshForEver();
