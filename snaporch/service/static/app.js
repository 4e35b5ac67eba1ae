// The page: who is let in, which domain is shown, and what is done to it.

import { render } from "./vendor/preact.mjs";
import { useEffect, useMemo, useState } from "./vendor/hooks.mjs";
import { Api } from "./api.js";
import { DomainDetail, SnapshotDetail } from "./detail.js";
import { CreateDialog, DeleteDialog, RevertDialog, VerifyDialog } from "./dialogs.js";
import { PastOperations, RunningOperations } from "./operations.js";
import { Store, useStore } from "./store.js";
import { Tree } from "./tree.js";
import { Field, html, Icon, Problem, State } from "./ui.js";

const TOKEN = "snaporch token"; // for this tab only: it is gone with it
const THEME = "snaporch theme";
const GOOD_NEWS = 6_000; // milliseconds
const MAY = new Set(["operator", "admin"]);
const THEMES = ["light dark", "light", "dark"];

// --- who is let in ---

function Enter({ error, onToken }) {
  const submit = (event) => {
    event.preventDefault();
    onToken(new FormData(event.target).get("token").trim());
  };
  return html`
    <main class="panel enter">
      <h1><img src="icon.svg" alt="" />snaporch</h1>
      <form onSubmit=${submit}>
        <${Field} label="Token" hint="An administrator makes one on the command line: snaporch token make NAME">
          <input name="token" type="password" autocomplete="current-password" required autofocus />
        <//>
        <${Problem} error=${error} />
        <button class="primary">Sign in</button>
      </form>
    </main>`;
}

function App() {
  const [token, setToken] = useState(sessionStorage.getItem(TOKEN) ?? "");
  const [refused, setRefused] = useState(null);
  const [messages, setMessages] = useState([]);
  const read = (id) => setMessages((all) => all.filter((each) => each.id !== id));
  const tell = (text, bad) => {
    const id = Math.random();
    setMessages((all) => [...all.slice(-3), { id, text, bad }]);
    if (!bad) setTimeout(read, GOOD_NEWS, id);
  };
  const [store, api] = useMemo(() => {
    const api = new Api(token);
    return [new Store(api, tell), api];
  }, [token]);
  useEffect(() => {
    if (refused) return undefined;
    const controller = new AbortController();
    store.run(controller.signal).catch((error) => {
      if (error.name !== "AbortError") setRefused(error);
    });
    return () => controller.abort();
  }, [store, refused]);

  const enter = (given) => {
    sessionStorage.setItem(TOKEN, given);
    setToken(given);
    setRefused(null);
  };
  if (refused?.status === 401) {
    // Whoever comes without a token has not been refused yet.
    return html`<${Enter} error=${token ? refused : null} onToken=${enter} />`;
  }
  const leave = () => {
    sessionStorage.removeItem(TOKEN);
    location.reload();
  };
  return html`
    <${Page} ...${{ store, api, refused }} onLeave=${token ? leave : null} />
    <${Messages} messages=${messages} onRead=${read} />`;
}

/** What has happened: read out, and shown; what is bad until it is closed. */
function Messages({ messages, onRead }) {
  return html`
    <div class="messages" role="status" aria-live="polite">
      ${messages.map(({ id, text, bad }) => html`
        <div key=${id} class=${bad ? "problem" : "fine"}>
          <${Icon} name=${bad ? "warning" : "check"} /> <span>${text}</span>
          <button class="quiet" aria-label="Dismiss" onClick=${() => onRead(id)}><${Icon} name="close" /></button>
        </div>`)}
    </div>`;
}

// --- the page ---

/** The domain that the address names after its #, or "". */
function useChosen() {
  const read = () => decodeURIComponent(location.hash.slice(1));
  const [chosen, setChosen] = useState(read);
  useEffect(() => {
    const listener = () => setChosen(read());
    addEventListener("hashchange", listener);
    return () => removeEventListener("hashchange", listener);
  }, []);
  return chosen;
}

function useTheme() {
  const [theme, setTheme] = useState(localStorage.getItem(THEME) ?? THEMES[0]);
  useEffect(() => {
    document.documentElement.style.colorScheme = theme;
    localStorage.setItem(THEME, theme);
  }, [theme]);
  return [theme, () => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length])];
}

function Page({ store, api, refused, onLeave }) {
  const state = useStore(store);
  const asked = useChosen();
  const [theme, nextTheme] = useTheme();
  const domains = state.domains ?? [];
  const chosen = domains.find(({ name }) => name === asked);
  const shown = chosen ?? (asked ? undefined : domains[0]); // on a wide page something is always shown
  useEffect(() => {
    store.show(shown?.name ?? null).catch(() => {});
    document.title = shown ? `${shown.name} – snaporch` : "snaporch";
  }, [store, shown?.name]);
  return html`
    <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); document.querySelector("main").focus(); }}>To the domain</a>
    <header class="top">
      <a class="brand" href="#"><img src="icon.svg" alt="" />snaporch</a>
      <span class="live sub" data-live=${state.live} role="status">${state.live ? "live" : "connecting…"}</span>
      <button class="quiet" aria-label=${`Colours: ${{ "light dark": "as the system" }[theme] ?? theme}`} onClick=${nextTheme}><${Icon} name="theme" /></button>
      ${onLeave && html`<button class="quiet" aria-label="Sign out" onClick=${onLeave}><${Icon} name="leave" /></button>`}
    </header>
    <${Problem} error=${refused} />
    <div class="layout" data-chosen=${Boolean(asked)}>
      <${Domains} ...${{ domains, state, shown }} />
      <main id="main" tabindex="-1">
        ${shown && html`<${Domain} key=${shown.name} ...${{ domain: shown, state, store, api }} />`}
        ${!shown && state.domains && html`<${Nothing} asked=${asked} />`}
      </main>
    </div>`;
}

function Nothing({ asked }) {
  return html`
    <div class="panel empty">
      <p>${asked ? html`There is no domain <b>${asked}</b>.` : "There are no domains yet."}</p>
      ${!asked && html`<p><code>snaporch domain define FILE</code> adds one.</p>`}
      ${asked && html`<a href="#">All domains</a>`}
    </div>`;
}

function Domains({ domains, state, shown }) {
  const running = Object.values(state.operations).filter(({ outcome }) => !outcome);
  return html`
    <nav class="domains" aria-labelledby="domains">
      <h2 id="domains">Domains</h2>
      ${domains.map(({ name, state: doing, current }) => {
        const operation = running.find((each) => concerns(each, name));
        return html`
          <a key=${name} href=${`#${encodeURIComponent(name)}`} aria-current=${name === shown?.name ? "page" : null}>
            <b>${name}</b><${State} state=${doing} />
            <span class="sub">${operation ? `${operation.kind} ${operation.subject}: ${operation.state}` : current ? `on top of ${current}` : "no snapshots"}</span>
          </a>`;
      })}
    </nav>`;
}

// --- one domain ---

/** Whether an operation is on a domain. */
function concerns(operation, name) {
  return operation.domains.includes(name);
}

function Legend() {
  return html`
    <p class="legend" aria-hidden="true">
      <span><svg viewBox="0 0 12 12"><g class="dot lane-0"><circle cx="6" cy="6" r="6" /></g></svg>memory and disks</span>
      <span><svg viewBox="0 0 12 12"><g class="dot disks lane-0"><rect x="1" y="1" width="10" height="10" rx="2" /></g></svg>disks only</span>
      <span>a dot’s area is the snapshot’s size</span>
    </p>`;
}

const POWER = {
  inactive: [["start", "play", "Start"]],
  running: [["pause", "pause", "Pause"], ["shutdown", "power", "Shut down"]],
  paused: [["resume", "play", "Resume"]],
};

/** Starts and stops the domain. */
function Power({ domain, store, api }) {
  const [busy, setBusy] = useState(false);
  const press = async (verb) => {
    setBusy(true);
    try {
      store.takeDomain(await api.power(domain.name, verb));
    } catch (problem) {
      store.tell(problem.message, true);
    }
    setBusy(false);
  };
  return POWER[domain.state].map(([verb, icon, label]) => html`
    <button key=${verb} disabled=${busy} onClick=${() => press(verb)}><${Icon} name=${icon} />${label}</button>`);
}

function Domain({ domain, state, store, api }) {
  const [selected, setSelected] = useState(null);
  const [dialog, setDialog] = useState(null); // an object: of the same kind, the next that is opened is another
  const snapshots = state.snapshots[domain.name];
  const operations = Object.values(state.operations).filter((each) => concerns(each, domain.name)).sort((a, b) => b.begun - a.begun);
  const running = operations.filter(({ outcome }) => !outcome);
  const record = snapshots?.find(({ name }) => name === selected);
  const may = MAY.has(state.me.role);
  useEffect(() => {
    if (selected && snapshots && !record) setSelected(null); // it is gone
  }, [snapshots]);

  const picture = useMemo(
    () => snapshots && html`<${Tree} ...${{ domain, snapshots, selected, operation: running[0] }} onSelect=${setSelected} />`,
    [domain, snapshots, selected, running[0]?.id, running[0]?.state], // not at each step of its progress
  );

  const ask = (kind) => setDialog({ kind });
  // A dialog tells later that it has closed, when the next may be open.
  const opened = { key: dialog, onClose: () => setDialog((now) => (now === dialog ? null : now)) };
  const begin = async (answer) => store.take(await answer);
  const dialogs = {
    create: () => html`<${CreateDialog} ...${{ ...opened, domain }}
      onSubmit=${(wanted) => begin(api.create(domain.name, wanted))} />`,
    revert: () => html`<${RevertDialog} ...${{ ...opened, domain, record }}
      onSubmit=${(wanted) => begin(api.revert(domain.name, record, wanted))} />`,
    delete: () => html`<${DeleteDialog} ...${{ ...opened, record }}
      hasChildren=${snapshots.some(({ parent }) => parent === record.name)}
      getPlan=${(flags) => api.planDelete(domain.name, record, flags)}
      onSubmit=${(flags) => begin(api.delete(domain.name, record, flags))} />`,
    verify: () => html`<${VerifyDialog} ...${{ ...opened, record }}
      onSubmit=${(boot) => begin(api.verify(domain.name, record, boot))} />`,
  };
  return html`
    <div class="head">
      <a class="upward" href="#" aria-label="All domains"><${Icon} name="back" /></a>
      <h1>${domain.name}</h1><${State} state=${domain.state} />
      ${may && html`
        <div class="actions">
          <${Power} ...${{ domain, store, api }} />
          <button class="primary" onClick=${() => ask("create")}><${Icon} name="camera" />Take snapshot</button>
        </div>`}
    </div>
    <${RunningOperations} operations=${running} mayCancel=${may} onCancel=${({ id }) => api.cancel(id)} />
    <div class="columns">
      <section class="panel picture" aria-label="Snapshot tree">
        ${picture}
        ${snapshots?.length > 0 && html`<${Legend} />`}
      </section>
      ${record
        ? html`<${SnapshotDetail} ...${{ record, may, verdict: state.verdicts[`${domain.name} ${selected}`] }} onClose=${() => setSelected(null)}
            onRevert=${() => ask("revert")} onDelete=${() => ask("delete")} onVerify=${() => ask("verify")} />`
        : html`<${DomainDetail} domain=${domain} />`}
    </div>
    <${PastOperations} operations=${operations.filter(({ outcome }) => outcome)} />
    ${dialog && (dialog.kind === "create" || record) && dialogs[dialog.kind]()}`;
}

render(html`<${App} />`, document.getElementById("app"));
