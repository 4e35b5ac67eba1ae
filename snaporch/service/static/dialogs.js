// What is asked before anything is done: the dialogs of create, revert, delete and verify.

import { useEffect, useState } from "./vendor/hooks.mjs";
import { basename, bytes, count } from "./format.js";
import { Choice, Dialog, Field, html, Icon, Problem } from "./ui.js";

const MIB = 2 ** 20;
const NAME = "[A-Za-z0-9][A-Za-z0-9._\\-]{0,63}"; // as snaporch.model.names.NAME

const STRATEGIES = [
  ["auto", "Automatic", "The best that this guest can do."],
  ["background", "Background", "The point is now; the guest is paused for milliseconds."],
  ["precopy", "Precopy", "The point is at the end, as in a live migration."],
];

export function CreateDialog({ domain, onSubmit, onClose }) {
  const active = domain.state !== "inactive";
  const [live, setLive] = useState(domain.state === "running");
  const [inside, setInside] = useState(false);
  const [strategy, setStrategy] = useState("auto");
  const streams = active && live && !inside;
  const within = domain.disks.filter((disk) => !disk.readonly).map(({ target }) => ({ disk: { target }, external: false }));
  const submit = ({ name, description, bandwidth, quiesce }) =>
    onSubmit({
      snapshot: { name, description, memory: active, disks: inside ? within : [] },
      flags: [streams && "live", quiesce].filter(Boolean),
      options: streams ? { strategy, bandwidth: Math.round(Number(bandwidth) * MIB) } : {},
    });
  return html`
    <${Dialog} title=${`Take a snapshot of ${domain.name}`} action="Take snapshot" ...${{ onSubmit: submit, onClose }}>
      <${Field} label="Name" hint="Letters, digits, “.”, “_” and “-”. Empty: made from the time.">
        <input name="name" pattern=${NAME} maxlength="64" autocomplete="off" autofocus spellcheck=${false} />
      <//>
      <${Field} label="Description"><input name="description" autocomplete="off" /><//>
      ${!active && html`<p class="hint">${domain.name} is inactive: the snapshot holds its disks.</p>`}
      <label class="switch">
        <input type="checkbox" role="switch" checked=${inside} onChange=${(event) => setInside(event.target.checked)} />
        <span><b>Keep it inside the images</b>
          <span class="hint">In no file of its own. A guest is paused until its memory is saved.</span>
        </span>
      </label>
      ${domain.state === "running" && html`
        <label class="switch">
          <input type="checkbox" role="switch" name="quiesce" value="quiesce" />
          <span><b>Freeze its file systems</b>
            <span class="hint">Its guest agent does, for the moment of the point.</span>
          </span>
        </label>`}
      ${active && !inside && html`
        <label class="switch">
          <input type="checkbox" role="switch" checked=${live} onChange=${(event) => setLive(event.target.checked)} />
          <span><b>Keep the guest running</b>
            <span class="hint">Without, it is paused until its memory is on disk: the smallest and quickest file.</span>
          </span>
        </label>`}
      ${streams && html`
        <${Choice} name="strategy" label="How its memory is saved" options=${STRATEGIES} value=${strategy} onChange=${setStrategy} />
        <${Field} label="Limit, MiB a second" hint="What its memory may take of the host’s disks. Empty: no limit.">
          <input name="bandwidth" type="number" min="0.1" step="any" inputmode="decimal" />
        <//>`}
    <//>`;
}

const AFTERWARDS = [
  ["", "As it was at the point", null],
  ["running", "Running", null],
  ["paused", "Paused", null],
];

export function RevertDialog({ domain, record, onSubmit, onClose }) {
  const [after, setAfter] = useState("");
  const [keep, setKeep] = useState(false);
  const submit = ({ save_current: name, force }) =>
    onSubmit({ save_current: keep ? name : "", flags: [after, force && "force"].filter(Boolean) });
  return html`
    <${Dialog} title=${`Go back to ${record.name}`} action="Go back" danger=${!keep} ...${{ onSubmit: submit, onClose }}>
      <p class=${keep ? "hint" : "warning"}>
        ${keep ? null : html`<${Icon} name="warning" />`}
        ${keep
          ? `What ${domain.name} holds now stays in a snapshot of its own.`
          : `What ${domain.name} holds now and no snapshot holds is lost.`}
      </p>
      <label class="switch">
        <input type="checkbox" role="switch" checked=${keep} onChange=${(event) => setKeep(event.target.checked)} />
        <span><b>Keep the present state first</b></span>
      </label>
      ${keep && html`
        <${Field} label="Its name"><input name="save_current" pattern=${NAME} maxlength="64" required autocomplete="off" spellcheck=${false} /><//>`}
      <${Choice} name="after" label="Afterwards the guest is" options=${AFTERWARDS} value=${after} onChange=${setAfter} />
      <label class="switch">
        <input type="checkbox" role="switch" name="force" value="force" />
        <span><b>Force</b>
          <span class="hint">Replaces a guest that no longer answers, and accepts a changed definition. If the snapshot then
            cannot be loaded, the present guest is gone all the same.</span>
        </span>
      </label>
    <//>`;
}

const SCOPES = [
  ["", "Only this snapshot", "Its changes merge into what grew out of it."],
  ["children", "It and all that grew out of it", null],
  ["children-only", "Only what grew out of it", null],
];

function Plan({ plan }) {
  if (!plan.doomed.length) return html`<p>There is nothing to delete.</p>`;
  return html`
    <section class="plan" aria-label="What will be done" aria-live="polite">
      <p><b>${count(plan.doomed.length, "snapshot")}</b> deleted: ${plan.doomed.join(", ")}</p>
      <p><b>${bytes(plan.bytes)}</b> to move, <b>${count(plan.unlink.length, "file")}</b> removed.
        What the guest and the other snapshots see does not change.</p>
      <ul>
        ${plan.steps.map((step) => html`
          <li key=${`${step.kind} ${step.top} ${step.base}`}>
            ${step.target}: merge <code title=${step.kind === "commit" ? step.top : step.base}>${basename(step.kind === "commit" ? step.top : step.base)}</code>
            ${step.kind === "commit" ? " down" : " up"} into <code title=${step.kind === "commit" ? step.base : step.top}>${basename(step.kind === "commit" ? step.base : step.top)}</code>
            <span class="sub"> ${bytes(step.bytes)}, ${step.where === "live" ? "in the running guest" : "offline"}</span>
          </li>`)}
        ${plan.unlink.map((path) => html`<li key=${path}>remove <code title=${path}>${basename(path)}</code></li>`)}
        ${plan.kept.map(([path, reason]) => html`<li key=${path}>keep <code title=${path}>${basename(path)}</code>: ${reason}</li>`)}
      </ul>
    </section>`;
}

/** `getPlan(flags)` answers what a delete would do; nothing can be confirmed before that is on the screen. */
export function DeleteDialog({ record, hasChildren, getPlan, onSubmit, onClose }) {
  const [scope, setScope] = useState("");
  const flags = scope ? [scope] : [];
  const [plan, setPlan] = useState(null);
  const [error, setError] = useState(null);
  useEffect(() => {
    let wanted = true;
    setPlan(null);
    setError(null);
    getPlan(flags).then((found) => wanted && setPlan(found), (problem) => wanted && setError(problem));
    return () => { wanted = false; };
  }, [scope]);
  const action = plan ? `Delete ${count(plan.doomed.length, "snapshot")}` : "Delete";
  return html`
    <${Dialog} title=${`Delete ${record.name}`} action=${action} danger ready=${plan?.doomed.length > 0}
      onSubmit=${() => onSubmit(flags)} onClose=${onClose}>
      ${hasChildren && html`<${Choice} name="scope" label="Delete" options=${SCOPES} value=${scope} onChange=${setScope} />`}
      ${plan ? html`<${Plan} plan=${plan} />` : !error && html`<p class="hint" role="status">Planning…</p>`}
      <${Problem} error=${error} />
    <//>`;
}

const DEPTHS = [
  ["", "Read every file", "Sizes and checksums are compared with what was saved."],
  ["boot", "Boot a copy too", "Loaded into a throw-away guest without network, which runs for a few seconds."],
];

export function VerifyDialog({ record, onSubmit, onClose }) {
  const [depth, setDepth] = useState("");
  return html`
    <${Dialog} title=${`Verify ${record.name}`} action="Verify" onSubmit=${() => onSubmit(depth === "boot")} onClose=${onClose}>
      <${Choice} name="depth" label="How far" options=${DEPTHS} value=${depth} onChange=${setDepth} />
    <//>`;
}
