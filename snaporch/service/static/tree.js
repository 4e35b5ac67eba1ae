// The snapshot tree as a picture: a graph at the left, a row for each snapshot, the present state on top.

import { useRef } from "./vendor/hooks.mjs";
import { ago, bytes } from "./format.js";
import { layout } from "./graph.js";
import { html, Icon, useNow } from "./ui.js";

const ROW = 60; // pixels; style.css has the same
const LANE = 26;
const RADIUS = { least: 5, most: 11 };

const x = (node) => (node.lane + 0.5) * LANE;
const y = (node) => (node.row + 0.5) * ROW;

/** The line from a snapshot to one that grew out of it: it bends at once, and goes straight up from there. */
function path({ from, to }) {
  if (from.lane === to.lane) return `M${x(from)} ${y(from)}V${y(to)}`;
  const turn = y(from) - ROW;
  return `M${x(from)} ${y(from)}C${x(from)} ${turn + ROW / 3} ${x(to)} ${y(from) - ROW / 3} ${x(to)} ${turn}V${y(to)}`;
}

/** A dot's area tells the size; round with memory, square without. */
function Dot({ node, record, largest, current, selected }) {
  const share = record ? Math.sqrt(record.bytes / largest) : 0;
  const radius = record ? RADIUS.least + (RADIUS.most - RADIUS.least) * share : RADIUS.least + 1;
  const kind = !record ? "now" : record.snapshot.memory ? "checkpoint" : "disks";
  const ring = current && html`<circle class="ring" cx=${x(node)} cy=${y(node)} r=${radius + 4} />`;
  const shape = kind === "disks"
    ? html`<rect x=${x(node) - radius} y=${y(node) - radius} width=${2 * radius} height=${2 * radius} rx="2" />`
    : html`<circle cx=${x(node)} cy=${y(node)} r=${radius} />`;
  return html`<g class=${`dot ${kind} lane-${node.lane % 6}`} data-selected=${selected}>${ring}${shape}</g>`;
}

function Graph({ graph, byName, largest, current, selected }) {
  const [width, height] = [graph.lanes * LANE, graph.rows.length * ROW];
  return html`
    <svg class="graph" width=${width} height=${height} viewBox=${`0 0 ${width} ${height}`} aria-hidden="true">
      ${graph.edges.map((edge) => html`
        <path key=${`edge ${edge.to.name}`} class=${`edge lane-${edge.to.lane % 6}`} d=${path(edge)}
          data-now=${edge.to.name === null} />`)}
      ${graph.rows.map((node) => html`
        <${Dot} key=${`dot ${node.name}`} node=${node} record=${byName.get(node.name)} largest=${largest}
          current=${node.name !== null && node.name === current} selected=${node.name === selected} />`)}
    </svg>`;
}

function NowRow({ domain, operation }) {
  return html`
    <span class="name">Now</span>
    <span class="sub">
      ${domain.state}${operation ? `, ${operation.kind} ${operation.subject} is ${operation.state}` : ""}
    </span>`;
}

function SnapshotRow({ record, current, largest, now }) {
  return html`
    <span class="name">${record.name}
      ${record.name === current && html`<span class="badge current">current</span>`}
      ${record.pinned && html`<span class="badge"><${Icon} name="pin" />pinned</span>`}
      ${record.deleting && html`<span class="badge doomed">deleting</span>`}
    </span>
    <span class="sub">
      ${ago(record.point, now)} · ${record.snapshot.memory ? "memory and disks" : "disks only"}${record.points.some(({ inside }) => inside) ? ", internal" : ""}
      ${record.parent ? html`<span class="unseen">, on top of ${record.parent}</span>` : ""}
      ${record.snapshot.description && html`<span class="description"> · ${record.snapshot.description}</span>`}
    </span>
    <span class="size"><span>${bytes(record.bytes)}</span>
      <svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">
        <rect width=${Math.max(1, (100 * record.bytes) / largest)} height="4" rx="2" />
      </svg>
    </span>`;
}

/** Where the arrow keys lead from a row: up and down as it looks, left to the parent, right to the newest child. */
const MOVES = {
  ArrowUp: (node, rows) => rows[node.row - 1],
  ArrowDown: (node, rows) => rows[node.row + 1],
  ArrowLeft: (node) => node.parent,
  ArrowRight: (node) => node.children.at(-1),
  Home: (node, rows) => rows[0],
  End: (node, rows) => rows.at(-1),
};

/** `selected` is a snapshot's name, or null for now. */
export function Tree({ domain, snapshots, operation, selected, onSelect }) {
  const now = useNow(10);
  const list = useRef();
  const graph = layout(snapshots, domain.current);
  const byName = new Map(snapshots.map((record) => [record.name, record]));
  const largest = Math.max(1, ...snapshots.map((record) => record.bytes));
  const onKeyDown = (event) => {
    if (event.key === "Escape") onSelect(null);
    const target = MOVES[event.key]?.(graph.rows.find((node) => node.name === selected), graph.rows);
    if (!target) return;
    event.preventDefault();
    onSelect(target.name);
    list.current.children[target.row].focus();
  };
  return html`
    <div class="tree">
      <${Graph} ...${{ graph, byName, largest, selected }} current=${domain.current} />
      <ul role="listbox" aria-label=${`Snapshots of ${domain.name}, newest first`} ref=${list} onKeyDown=${onKeyDown}>
        ${graph.rows.map(({ name }) => html`
          <li key=${name ?? " now"} role="option" aria-selected=${name === selected} tabindex=${name === selected ? 0 : -1}
            onClick=${() => onSelect(name)}>
            ${name === null
              ? html`<${NowRow} domain=${domain} operation=${operation} />`
              : html`<${SnapshotRow} ...${{ record: byName.get(name), current: domain.current, largest, now }} />`}
          </li>`)}
      </ul>
    </div>`;
}
