// What is known of the chosen snapshot, or of the domain as it is now.

import { basename, bytes, duration, instant } from "./format.js";
import { Facts, html, Icon, State } from "./ui.js";

function Points({ points }) {
  return html`
    <ul class="images">
      ${points.map(({ target, file, inside, chain }) => html`
        <li key=${target}><b>${target}</b> <code title=${file?.path}>${file && basename(file.path)}</code>
          <span class="sub"> ${file && bytes(file.size)}, ${inside ? "inside the image" : `${chain} in its chain`}</span></li>`)}
    </ul>`;
}

export function SnapshotDetail({ record, verdict, may, onRevert, onDelete, onVerify, onClose }) {
  const { memory, timings } = record;
  return html`
    <section class="panel detail sheet" aria-labelledby="chosen">
      <header>
        <h2 id="chosen">${record.name}</h2>
        <button class="quiet close" aria-label="Close" onClick=${onClose}><${Icon} name="close" /></button>
      </header>
      ${record.snapshot.description && html`<p>${record.snapshot.description}</p>`}
      ${may && html`
        <div class="actions">
          <button onClick=${onRevert} disabled=${record.deleting}><${Icon} name="revert" />Go back</button>
          <button onClick=${onVerify} disabled=${record.deleting}><${Icon} name="check" />Verify</button>
          <button class="danger quiet" onClick=${onDelete}><${Icon} name="trash" />Delete</button>
        </div>`}
      ${verdict && html`<${Verdict} verdict=${verdict} />`}
      <${Facts} facts=${{
        Point: instant(record.point),
        Guest: `${record.domain_state} at the point`,
        Pause: timings.pause == null ? null : duration(timings.pause),
        Total: duration(timings.total),
        Strategy: html`${record.strategy} <span class="sub">${record.reason}</span>`,
        Memory: memory && html`<code title=${memory.path}>${basename(memory.path)}</code> <span class="sub">${bytes(memory.size)}</span>`,
        Disks: html`<${Points} points=${record.points} />`,
        "Grown from": record.parent ?? "no snapshot",
      }} />
    </section>`;
}

function Verdict({ verdict }) {
  if (verdict.ok) {
    return html`<p class="fine" role="status"><${Icon} name="check" />Every file is what was saved${verdict.booted ? ", and a copy runs" : ""}.</p>`;
  }
  return html`
    <div class="problem" role="alert"><${Icon} name="warning" />
      <ul>${verdict.problems.map((problem) => html`<li key=${problem}>${problem}</li>`)}</ul>
    </div>`;
}

export function DomainDetail({ domain }) {
  return html`
    <section class="panel detail" aria-labelledby="chosen">
      <header><h2 id="chosen">${domain.name} now</h2></header>
      <${Facts} facts=${{
        State: html`<${State} state=${domain.state} />`,
        "Grown from": domain.current ?? "no snapshot",
        Hypervisor: domain.pid ? `${domain.driver}, process ${domain.pid}` : domain.driver,
        Tags: domain.tags.join(", "),
      }} />
      <h3>Disks</h3>
      <ul class="images">
        ${domain.disks.map((disk) => html`
          <li key=${disk.target}><b>${disk.target}</b> <code title=${disk.active}>${basename(disk.active)}</code>
            <span class="sub"> ${disk.format}, ${bytes(disk.virtual_size)}${disk.readonly ? ", read-only" : ""}, ${disk.chain.length} in its chain</span>
          </li>`)}
      </ul>
    </section>`;
}
