// What the page knows: fetched once, then kept true by the service's events. Views get it whole and never fetch.

import { useEffect, useState } from "./vendor/hooks.mjs";

const REFRESH = 10_000; // milliseconds: guests start and stop by themselves, and no event tells of that

const by = (key, list) => Object.fromEntries(list.map((each) => [each[key], each]));

/** A snapshot's record, and what the page needs of it besides: where each disk's point is, and the bytes of its own. */
function withSize(record) {
  const points = record.snapshot.disks.map(({ disk: { target } }) => {
    const inside = record.inside?.[target];
    const [image, ...below] = record.images[target] ?? [];
    return { target, file: inside ?? image, inside: Boolean(inside), chain: inside ? null : 1 + below.length };
  });
  const bytes = points.reduce((sum, { file }) => sum + (file?.size ?? 0), record.memory?.size ?? 0);
  return { ...record, name: record.snapshot.name, points, bytes };
}

export class Store {
  #api;
  #listeners = new Set();
  #fetching = null;
  #next = null;

  /** `tell(text, bad)` is called with what a person should hear of. */
  constructor(api, tell) {
    this.#api = api;
    this.tell = tell;
    this.state = { me: null, domains: null, snapshots: {}, operations: {}, verdicts: {}, live: false };
    this.shown = null;
  }

  #set(change) {
    this.state = { ...this.state, ...change };
    for (const listener of this.#listeners) listener(this.state);
  }

  subscribe(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Follow the service until `signal` is aborted; throws when it does not let us in. */
  async run(signal) {
    this.#set({ me: await this.#api.whoami() });
    const timer = setInterval(() => document.hidden || this.#refresh(), REFRESH);
    signal.addEventListener("abort", () => clearInterval(timer));
    const onOpen = async () => {
      await this.refresh(); // whatever happened while nobody listened
      this.#set({ live: true });
    };
    const onEvent = (kind, event) => (event.operation ? this.#happened(event) : kind === "gap" && this.#refresh());
    await this.#api.follow(onEvent, onOpen, () => this.#set({ live: false }), signal);
  }

  /** Fetch everything that is shown; one after the other, for an answer that is late must not replace a newer one. */
  refresh() {
    const begin = () => {
      this.#fetching = this.#next;
      this.#next = null;
      return this.#fetch();
    };
    this.#next ??= (this.#fetching ?? Promise.resolve()).then(begin, begin);
    return this.#next;
  }

  async #fetch() {
    const [domains, operations] = await Promise.all([this.#api.domains(), this.#api.operations()]);
    const over = Object.fromEntries(Object.entries(this.state.operations).filter(([, { outcome }]) => outcome));
    this.#set({ domains, operations: this.#with(over, operations) });
    if (domains.some(({ name }) => name === this.shown)) await this.show(this.shown);
  }

  /** Operations by id, with those that were fetched; of what is known of these, nothing is forgotten. */
  #with(operations, fetched) {
    const known = this.state.operations;
    return { ...operations, ...by("id", fetched.map((each) => ({ ...known[each.id], ...each }))) };
  }

  /** As refresh; what fails is seen by the events' connection, which is what says so. */
  #refresh() {
    this.refresh().catch(() => {});
  }

  /** Keep a domain's snapshots up to date from now on. */
  async show(domain) {
    this.shown = domain;
    if (!domain) return;
    const [found, operations] = await Promise.all([this.#api.snapshots(domain), this.#api.operations(domain)]);
    const snapshots = { ...this.state.snapshots, [domain]: found.map(withSize) };
    this.#set({ snapshots, operations: this.#with(this.state.operations, operations) });
  }

  #happened({ operation: id, kind, state, done, total, time }) {
    const known = this.state.operations[id];
    if (!known) {
      this.#refresh();
      return;
    }
    const steps = known.steps ?? [];
    const change = kind === "progress"
      ? { done, total }
      : { state, steps: steps.at(-1)?.state === state ? steps : [...steps, { state, time }] };
    this.take({ ...known, ...change });
    if (["complete", "rolled-back", "stranded", "failed", "refused"].includes(state)) this.#ended(id);
  }

  async #ended(id) {
    const operation = await this.#api.ended(id);
    this.take(operation);
    const what = `${operation.domains.join(", ")}: ${operation.kind} ${operation.subject}`;
    if (operation.outcome !== "complete") this.tell(operation.error?.detail ?? `${what} is ${operation.outcome}`, true);
    else if (operation.kind === "verify") this.#judged(operation);
    else this.tell(`${what} is complete`, false);
    this.#refresh();
  }

  #judged({ domains: [domain], subject, result }) {
    this.#set({ verdicts: { ...this.state.verdicts, [`${domain} ${subject}`]: result } });
    this.tell(result.ok ? `${subject} is what was saved` : `${subject} is damaged`, !result.ok);
  }

  /** Know how a domain is now. */
  takeDomain(domain) {
    this.#set({ domains: this.state.domains.map((each) => (each.name === domain.name ? domain : each)) });
  }

  /** Know an operation, or know more of it. */
  take(operation) {
    const known = this.state.operations[operation.id];
    this.#set({ operations: { ...this.state.operations, [operation.id]: { ...known, ...operation } } });
  }
}

/** The store's state, anew whenever it changes. */
export function useStore(store) {
  const [state, setState] = useState(store.state);
  useEffect(() => {
    setState(store.state);
    return store.subscribe(setState);
  }, [store]);
  return state;
}
