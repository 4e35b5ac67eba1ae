// What the page knows: fetched once, then kept true by the service's events, which say what operations do, and by its
// list of changes, which says what is in the catalog, whoever put it there. Views get it whole and never fetch.

import { useEffect, useState } from "./vendor/hooks.mjs";

// Milliseconds: guests start and stop by themselves, and nobody tells of that. The one that is shown is looked at often.
const LOOK = 10_000;
const LOOK_AT_ALL = 60_000;
const RETRY = 2_000;
const MANY = 20; // domains of which all are asked for rather than each

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
  #last = Promise.resolve();
  #next = null;
  #revision = null;

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
    const timers = [
      setInterval(() => document.hidden || !this.shown || this.#look([this.shown]), LOOK),
      setInterval(() => document.hidden || this.#refresh(), LOOK_AT_ALL),
    ];
    signal.addEventListener("abort", () => timers.forEach(clearInterval));
    const onOpen = async () => {
      await this.refresh(); // whatever happened while nobody listened
      this.#set({ live: true });
    };
    const onEvent = (kind, event) => (event.operation ? this.#happened(event) : kind === "gap" && this.#refresh());
    this.#keep(signal);
    await this.#api.follow(onEvent, onOpen, () => this.#set({ live: false }), signal);
  }

  /** Do one thing after the other: an answer that is late must not replace a newer one. */
  #inTurn(work) {
    this.#last = this.#last.then(work, work);
    return this.#last;
  }

  /** Fetch everything that is shown. */
  refresh() {
    this.#next ??= this.#inTurn(() => {
      this.#next = null;
      return this.#fetch();
    });
    return this.#next;
  }

  async #fetch() {
    const { revision } = await this.#api.changes("now"); // first: what changes meanwhile is told of after it
    const [domains] = await Promise.all([this.#api.domains(), this.#operations()]);
    this.#set({ domains });
    this.#revision = revision;
    if (domains.some(({ name }) => name === this.shown)) await this.#show(this.shown);
  }

  async #operations() {
    const operations = await this.#api.operations();
    const over = Object.fromEntries(Object.entries(this.state.operations).filter(([, { outcome }]) => outcome));
    this.#set({ operations: this.#with(over, operations) });
  }

  /** Take over what changes in the catalog, until `signal` is aborted; a lost connection is said by the events'. */
  async #keep(signal) {
    while (!signal.aborted) {
      try {
        const asked = this.#revision;
        const page = asked === null ? null : await this.#api.changes(asked, signal);
        if (page?.gap) await this.refresh();
        else if (page) await this.#inTurn(() => asked === this.#revision && this.#take(page));
        if (page?.items.length) continue; // a service that stops answers at once, with nothing
      } catch {
        // It is asked again, for the same.
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY));
    }
  }

  /** Know what a page of changes tells of: of domains, and of the snapshots of the one that is shown. */
  async #take({ items, revision }) {
    const gone = new Set(items.filter(({ kind, gone }) => kind === "domain" && gone).map(({ domain }) => domain));
    const changed = items.filter(({ kind, gone }) => kind === "domain" && !gone).map(({ domain }) => domain);
    const found = changed.length > MANY ? await this.#api.domains() : await this.#fetched(changed, (name) => this.#api.domain(name));
    const domains = new Map(this.state.domains.map((each) => [each.name, each]));
    for (const name of gone) domains.delete(name);
    for (const each of found) domains.set(each.name, each);
    this.#set({ domains: [...domains.values()].sort((one, other) => (one.name < other.name ? -1 : 1)) });
    const shown = this.shown;
    const here = items.filter(({ kind, domain }) => kind === "snapshot" && domain === shown);
    if (here.length && this.state.snapshots[shown]) await this.#takeSnapshots(shown, here);
    this.#revision = revision;
  }

  async #takeSnapshots(domain, items) {
    const names = items.filter(({ gone }) => !gone).map(({ name }) => name);
    const found = (await this.#fetched(names, (name) => this.#api.snapshot(domain, name))).map(withSize);
    const snapshots = new Map(this.state.snapshots[domain].map((each) => [each.id, each])); // in their order: oldest first
    for (const each of found) snapshots.set(each.id, each); // in its place, by whatever name
    const gone = new Set(items.filter((each) => each.gone).map(({ name }) => name));
    const left = [...snapshots.values()].filter(({ name }) => !gone.has(name));
    this.#set({ snapshots: { ...this.state.snapshots, [domain]: left } });
  }

  /** What is fetched by these names; what is gone by now is told of next. */
  async #fetched(names, fetch) {
    const found = names.map((name) => fetch(name).catch((error) => {
      if (error.status !== 404) throw error;
    }));
    return (await Promise.all(found)).filter(Boolean);
  }

  /** Look at some domains, as they are now. */
  #look(names) {
    const look = async () => (await this.#fetched(names, (name) => this.#api.domain(name))).forEach((each) => this.takeDomain(each));
    this.#inTurn(look).catch(() => {});
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
    if (domain) await this.#inTurn(() => this.#show(domain));
  }

  async #show(domain) {
    const [found, operations] = await Promise.all([this.#api.snapshots(domain), this.#api.operations(domain)]);
    const snapshots = { ...this.state.snapshots, [domain]: found.map(withSize) };
    this.#set({ snapshots, operations: this.#with(this.state.operations, operations) });
  }

  #happened({ operation: id, kind, state, done, total, time }) {
    const known = this.state.operations[id];
    if (!known) {
      this.#inTurn(() => this.#operations()).catch(() => {});
      return;
    }
    const steps = known.steps ?? [];
    const change = kind === "progress"
      ? { done, total }
      : { state, steps: steps.at(-1)?.state === state ? steps : [...steps, { state, time }] };
    this.take({ ...known, ...change });
    if (["complete", "rolled-back", "stranded", "failed", "refused"].includes(state)) this.#ended(id).catch(() => {}); // when the service is back, all is asked anew
  }

  async #ended(id) {
    const operation = await this.#api.ended(id);
    this.take(operation);
    const what = `${operation.domains.join(", ")}: ${operation.kind} ${operation.subject}`;
    if (operation.outcome !== "complete") this.tell(operation.error?.detail ?? `${what} is ${operation.outcome}`, true);
    else if (operation.kind === "verify") this.#judged(operation);
    else this.tell(`${what} is complete`, false);
    this.#look(operation.domains);
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
