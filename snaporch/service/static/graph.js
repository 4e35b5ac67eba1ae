// Lays a snapshot tree out as a graph: a row each, newest first, and lanes beside each other for the branches. Pure.
//
// Row 0 is the present state, "now"; it grows out of the current snapshot. A *chain* is a snapshot and, upwards, one
// child of each: the one towards now, else the oldest. A chain keeps its lane; a branch is a chain that bends out of
// another. The chain that ends at now has the leftmost lane, so that what led to the present is one straight line.

/**
 * @param records snapshots, oldest first, each with `name` and `parent`
 * @param current the name of the snapshot that the present state descends from, or null
 * @returns {rows, edges, lanes}: rows `{name, lane, row, level, parent, children}` (name null is now), edges
 *     `{from, to}` from the older to the newer row, and how many lanes there are
 */
export function layout(records, current) {
  const nodes = [null, ...[...records].reverse().map((record) => record.name)].map((name, row) => ({ name, row }));
  const byName = new Map(nodes.map((node) => [node.name, node]));
  const parentOf = new Map(records.map((record) => [record.name, record.parent]));
  parentOf.set(null, current);
  for (const node of nodes) {
    node.parent = parentOf.get(node.name) == null ? undefined : byName.get(parentOf.get(node.name));
    node.children = [];
  }
  // From the oldest on, so that each node's children are oldest first.
  for (const node of [...nodes].reverse()) node.parent?.children.push(node);
  const present = new Set();
  for (let node = nodes[0]; node; node = node.parent) present.add(node);
  const main = (node) => node.children.find((child) => present.has(child)) ?? node.children[0];

  const heads = nodes.filter((node) => !node.parent || main(node.parent) !== node);
  const chains = heads.map((head) => {
    const chain = [head];
    while (main(chain.at(-1))) chain.push(main(chain.at(-1)));
    // A branch has its lane from just above the row that it bends out of.
    return { chain, top: chain.at(-1).row, bottom: head.parent ? head.parent.row - 1 : head.row };
  });
  chains.sort((a, b) => present.has(b.chain.at(-1)) - present.has(a.chain.at(-1)) || b.bottom - a.bottom);
  const lanes = [];
  for (const { chain, top, bottom } of chains) {
    const free = lanes.findIndex((taken) => taken.every((other) => other.bottom < top || bottom < other.top));
    const lane = free < 0 ? lanes.push([]) - 1 : free;
    lanes[lane].push({ top, bottom });
    for (const node of chain) node.lane = lane;
  }
  for (const node of [...nodes].reverse()) node.level = node.parent ? node.parent.level + 1 : 1;
  const edges = nodes.filter((node) => node.parent).map((node) => ({ from: node.parent, to: node }));
  return { rows: nodes, edges, lanes: lanes.length };
}
