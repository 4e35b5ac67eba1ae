// Numbers and instants, as the command line says them.

const KIB = 1024;
const AGES = [[86_400, "d"], [3_600, "h"], [60, "min"], [1, "s"]];

/** For example "23.4 MiB". */
export function bytes(number) {
  let value = number;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (value < KIB) return unit === "B" ? `${value} B` : `${value.toFixed(1)} ${unit}`;
    value /= KIB;
  }
  return `${value.toFixed(1)} TiB`;
}

/** For example "12.3 ms", "4.56 s" or "2 min 5 s". */
export function duration(seconds) {
  if (seconds == null) return "–";
  if (seconds < 1) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 60) return `${seconds.toFixed(2)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}

/** For example "5 min ago"; both in seconds since the epoch. */
export function ago(instant, now) {
  const seconds = Math.max(0, now - instant);
  const found = AGES.find(([unit]) => seconds >= unit);
  return found ? `${Math.floor(seconds / found[0])} ${found[1]} ago` : "just now";
}

/** The instant in full, in the reader's own time. */
export function instant(seconds) {
  return new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
}

/** For example "1 file" or "2 files". */
export function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

/** The last part of a path. */
export function basename(path) {
  return path.slice(path.lastIndexOf("/") + 1);
}
