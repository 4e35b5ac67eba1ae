// Running operations with their phases and progress, and what became of earlier ones.

import { useState } from "./vendor/hooks.mjs";
import { ago, bytes, duration } from "./format.js";
import { html, Icon, Problem, State, useNow } from "./ui.js";

const PAST = 8; // shown at first

/** Phases in the order in which they were entered, [name, seconds]; of the last one the seconds so far. */
function phasesOf(operation, now) {
  const steps = operation.steps ?? [];
  if (operation.outcome || !steps.length) return Object.entries(operation.phases);
  const seen = steps.map(({ state, time }, at) => [state, (steps[at + 1]?.time ?? Math.max(now, time)) - time]);
  const missed = Object.entries(operation.phases).filter(([name]) => !steps.some(({ state }) => state === name));
  return [...missed, ...seen];
}

function Phases({ operation, now }) {
  return html`
    <ol class="phases">
      ${phasesOf(operation, now).map(([name, seconds]) => html`
        <li key=${name} data-phase=${name} aria-current=${!operation.outcome && name === operation.state ? "step" : null}>
          ${name} <span>${duration(seconds)}</span>
        </li>`)}
    </ol>`;
}

function Progress({ operation }) {
  const { done, total } = operation;
  if (!total) return html`<progress aria-label="Progress"></progress>`;
  // What has to be moved may grow while it is moved.
  return html`
    <progress aria-label="Progress" value=${Math.min(done, total)} max=${total}></progress>
    <p class="sub">${bytes(done)} of ${bytes(total)}</p>`;
}

function Running({ operation, mayCancel, onCancel }) {
  const now = useNow();
  const [asked, setAsked] = useState(false);
  const [error, setError] = useState(null);
  const cancel = async () => {
    setAsked(true);
    try {
      await onCancel(operation);
    } catch (problem) {
      setError(problem);
      setAsked(false);
    }
  };
  return html`
    <article class="running" aria-label=${`${operation.kind} ${operation.subject}`}>
      <header>
        <h3>${operation.kind} <b>${operation.subject}</b></h3>
        <span class="sub">${duration(Math.max(0, now - operation.begun))}</span>
        ${mayCancel && html`<button onClick=${cancel} disabled=${asked}>${asked ? "Cancelling…" : "Cancel"}</button>`}
      </header>
      <${Progress} operation=${operation} />
      <${Phases} operation=${operation} now=${now} />
      <${Problem} error=${error} />
    </article>`;
}

/** The operations that run now. */
export function RunningOperations({ operations, mayCancel, onCancel }) {
  if (!operations.length) return null;
  return html`
    <section class="panel" aria-label="Running operations">
      ${operations.map((operation) => html`<${Running} key=${operation.id} ...${{ operation, mayCancel, onCancel }} />`)}
    </section>`;
}

/** What each phase took, as parts of one bar; the words are in the bar's title and in the row's details. */
function Shares({ phases }) {
  const sum = phases.reduce((total, [, seconds]) => total + seconds, 0) || 1;
  let left = 0;
  const parts = phases.map(([name, seconds]) => {
    const part = html`<rect key=${name} data-phase=${name} x=${left} width=${(100 * seconds) / sum} height="6" />`;
    left += (100 * seconds) / sum;
    return part;
  });
  return html`<svg class="shares" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">${parts}</svg>`;
}

function Past({ operation, now }) {
  const phases = Object.entries(operation.phases);
  const pause = operation.kind === "create" ? operation.result?.timings.pause : null;
  return html`
    <li>
      <details>
        <summary>
          <${State} state=${operation.outcome} />
          <span class="what">${operation.kind} <b>${operation.subject}</b></span>
          ${pause != null && html`<span class="pause">${duration(pause)} pause</span>`}
          <span class="sub">${ago(operation.begun, now)}</span>
          <span class="sub took">${operation.ended ? duration(operation.ended - operation.begun) : ""}</span>
        </summary>
        <${Problem} error=${operation.error && { message: operation.error.detail }} />
        ${phases.length > 0 && html`<${Shares} phases=${phases} /><${Phases} operation=${operation} now=${now} />`}
        <p class="sub">operation ${operation.id}${operation.by ? `, asked for by ${operation.by}` : ""}</p>
      </details>
    </li>`;
}

/** Earlier operations, the latest first. */
export function PastOperations({ operations }) {
  const now = useNow(10);
  const [all, setAll] = useState(false);
  if (!operations.length) return null;
  const shown = all ? operations : operations.slice(0, PAST);
  return html`
    <section class="panel" aria-labelledby="past">
      <h2 id="past">Earlier operations</h2>
      <ul class="past">${shown.map((operation) => html`<${Past} key=${operation.id} operation=${operation} now=${now} />`)}</ul>
      ${shown.length < operations.length && html`
        <button class="quiet" onClick=${() => setAll(true)}>Show all ${operations.length}</button>`}
    </section>`;
}
