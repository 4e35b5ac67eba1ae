// What all parts of the page share: the template tag, icons, badges, dialogs.

import { h } from "./vendor/preact.mjs";
import { useEffect, useId, useRef, useState } from "./vendor/hooks.mjs";
import htm from "./vendor/htm.mjs";

/** Templates that make elements; what is put into them is text, never markup. */
export const html = htm.bind(h);

const ICONS = {
  camera: "M4 8h3l2-3h6l2 3h3v11H4zM12 10a3.5 3.5 0 1 0 0 7 3.5 3.5 0 0 0 0-7z",
  back: "M15 5l-7 7 7 7",
  revert: "M9 7L4 12l5 5M4 12h10a6 6 0 0 1 6 6v1",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  check: "M5 13l4 4L19 7",
  close: "M6 6l12 12M18 6L6 18",
  pin: "M12 21v-7M7 14h10l-2-4V4H9v6z",
  warning: "M12 4l9 16H3zM12 10v5M12 17.5v.5",
  play: "M8 5l11 7-11 7z",
  pause: "M8 5v14M16 5v14",
  power: "M12 4v8M7 7a7 7 0 1 0 10 0",
  theme: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  leave: "M10 5H5v14h5M14 8l4 4-4 4M18 12H9",
};

export function Icon({ name }) {
  return html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true"><path d=${ICONS[name]} /></svg>`;
}

/** A state in words, with its colour and its own shape, so that neither is needed to tell it. */
export function State({ state }) {
  return html`<span class="state" data-state=${state}>${state}</span>`;
}

/** The present time in seconds, told anew every few seconds while somebody looks. */
export function useNow(seconds = 1) {
  const [now, setNow] = useState(Date.now() / 1000);
  useEffect(() => {
    const timer = setInterval(() => document.hidden || setNow(Date.now() / 1000), 1000 * seconds);
    return () => clearInterval(timer);
  }, []);
  return now;
}

/** A modal dialog with a form; `onSubmit` may throw: what was wrong is then said in the dialog, which stays. */
export function Dialog({ title, action, danger, ready = true, onSubmit, onClose, children }) {
  const dialog = useRef();
  const heading = useId();
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  useEffect(() => dialog.current.showModal(), []);
  const submit = async (event) => {
    event.preventDefault();
    setBusy(true);
    try {
      await onSubmit(Object.fromEntries(new FormData(event.target)));
      dialog.current.close();
    } catch (problem) {
      setError(problem);
      setBusy(false);
    }
  };
  return html`
    <dialog ref=${dialog} aria-labelledby=${heading} onClose=${onClose}>
      <form onSubmit=${submit}>
        <header>
          <h2 id=${heading}>${title}</h2>
          <button type="button" class="quiet" aria-label="Close" onClick=${() => dialog.current.close()}>
            <${Icon} name="close" />
          </button>
        </header>
        <div class="body">${children}<${Problem} error=${error} /></div>
        <footer>
          <button type="button" onClick=${() => dialog.current.close()}>Not now</button>
          <button class=${danger ? "danger" : "primary"} disabled=${busy || !ready}>${action}</button>
        </footer>
      </form>
    </dialog>`;
}

export function Problem({ error }) {
  return error && html`<p class="problem" role="alert"><${Icon} name="warning" /> ${error.message}</p>`;
}

/** A labelled field with a line on what it means. */
export function Field({ label, hint, children }) {
  return html`
    <label class="field">
      <span class="label">${label}</span>
      ${children}
      ${hint && html`<span class="hint">${hint}</span>`}
    </label>`;
}

/** One of several ways; `options` are [value, title, what it means]. */
export function Choice({ name, label, options, value, onChange }) {
  return html`
    <fieldset class="choice">
      <legend>${label}</legend>
      ${options.map(([key, title, hint]) => html`
        <label key=${key}>
          <input type="radio" name=${name} value=${key} checked=${key === value} onChange=${() => onChange(key)} />
          <span><b>${title}</b>${hint && html`<span class="hint">${hint}</span>`}</span>
        </label>`)}
    </fieldset>`;
}

/** Names and values, those without a value left out. */
export function Facts({ facts }) {
  const told = Object.entries(facts).filter(([, value]) => value != null && value !== "");
  return html`<dl class="facts">${told.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;
}
