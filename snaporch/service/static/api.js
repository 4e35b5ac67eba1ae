// The service's API, as docs/how-to/service.md has it: all that the page knows of URLs and of errors is here.

const RETRY = { first: 500, most: 10_000 }; // milliseconds

/** What the service refused, in its own words (RFC 9457); `status` is 0 when it could not be reached. */
export class Problem extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

const PATIENCE = 20; // seconds
const SHOWN = 100; // operations: the page has no place for more
const PAGE = 1000; // as many as a page may have

const at = (...parts) => `v1/${parts.map(encodeURIComponent).join("/")}`;

/** Yields {id, event, data} of a stream of server-sent events. */
async function* sent(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value.replaceAll("\r", "");
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const fields = {};
      for (const line of text.slice(0, end).split("\n")) {
        const [, name, content] = /^(\w+): ?(.*)$/.exec(line) ?? [];
        if (name) fields[name] = name in fields ? `${fields[name]}\n${content}` : content;
      }
      yield fields;
    }
  }
}

export class Api {
  #token;

  /** `token` is empty where the service knows who asks without: behind its unix socket. */
  constructor(token) {
    this.#token = token;
  }

  async #fetch(url, options = {}) {
    const headers = { ...options.headers };
    if (this.#token) headers.Authorization = `Bearer ${this.#token}`;
    let response;
    try {
      response = await fetch(url, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem(0, "The service does not answer.");
    }
    if (response.ok) return response;
    const problem = await response.json().catch(() => ({}));
    throw new Problem(response.status, problem.detail || problem.title || `The service answers with ${response.status}.`);
  }

  async #get(url, options) {
    return (await this.#fetch(url, options)).json();
  }

  /** All items of a list, page by page. */
  async #all(url) {
    const items = [];
    for (let after = null; ;) {
      const page = await this.#get(`${url}?limit=${PAGE}${after === null ? "" : `&after=${encodeURIComponent(after)}`}`);
      items.push(...page.items);
      after = page.next;
      if (after === null) return items;
    }
  }

  async #post(url, body = {}) {
    const headers = { "Content-Type": "application/json" };
    return (await this.#fetch(url, { method: "POST", headers, body: JSON.stringify(body) })).json();
  }

  whoami = () => this.#get(at("whoami"));
  domains = () => this.#all(at("domains"));
  domain = (name) => this.#get(at("domains", name));
  snapshot = (domain, name) => this.#get(at("domains", domain, "snapshots", name));
  /** What has changed in the catalog after a revision, as soon as something has; after "now": the present one. */
  changes = (after, signal) => this.#get(`${at("changes")}?after=${after}&wait=${PATIENCE}&limit=${PAGE}`, { signal });
  snapshots = (domain) => this.#all(at("domains", domain, "snapshots"));
  /** The newest operations, of one domain or all; and those that run, however old they are. */
  operations = async (domain) => {
    const of = domain ? `&domain=${encodeURIComponent(domain)}` : "";
    const asked = ["", "&outcome=running"].map((more) => this.#get(`${at("operations")}?limit=${SHOWN}${of}${more}`));
    return (await Promise.all(asked)).flatMap(({ items }) => items);
  };
  /** As soon as it has ended. */
  ended = (id) => this.#get(`${at("operations", id)}?wait=${PATIENCE}`);

  create = (domain, wanted) => this.#post(at("domains", domain, "snapshots"), wanted);
  /** What is done to a snapshot is done by its id too: its name may be another's since the page has seen it. */
  revert = (domain, { name, id }, wanted) => this.#post(at("domains", domain, "snapshots", name, "revert"), { ...wanted, ids: [id] });
  verify = (domain, { name, id }, boot) => this.#post(at("domains", domain, "snapshots", name, "verify"), { boot, ids: [id] });
  delete = (domain, { name, id }, flags) => this.#post(at("domains", domain, "delete"), { names: [name], ids: [id], flags });
  planDelete = (domain, { name, id }, flags) => this.#post(at("domains", domain, "delete", "plan"), { names: [name], ids: [id], flags });
  /** `verb`: start, pause, resume or shutdown. */
  power = (domain, verb) => this.#post(at("domains", domain, verb));
  cancel = (id) => this.#post(at("operations", id, "cancel"));

  /** Call `onEvent(kind, event)` until `signal` is aborted; a lost connection is made again, from the last event. */
  async follow(onEvent, onOpen, onLost, signal) {
    let last = "";
    for (let wait = RETRY.first; !signal.aborted; wait = Math.min(2 * wait, RETRY.most)) {
      try {
        const headers = last ? { "Last-Event-ID": last } : {};
        const response = await this.#fetch(at("events"), { headers, signal });
        await onOpen();
        wait = RETRY.first;
        for await (const { id, event, data } of sent(response.body)) {
          if (id) last = id;
          if (data) onEvent(event, JSON.parse(data));
        }
      } catch (error) {
        if (signal.aborted || error.status === 401 || error.status === 403) throw error;
      }
      onLost();
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}
