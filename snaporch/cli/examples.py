"""Where each verb stands in the help, and what it is used for: a command line each, which a test reads as typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cyclopts import App, Group

GROUPS: Mapping[str, Sequence[str]] = {
    "Machines": ("domain", "clone"),
    "Snapshots": (
        "create",
        "list",
        "tree",
        "show",
        "revert",
        "delete",
        "edit",
        "pin",
        "verify",
        "prune",
        "flatten",
    ),
    "Files": ("export", "export-disk", "import"),
    "Many machines, many users": ("batch", "serve", "token", "watch"),
    "This root, this host": ("doctor", "operations", "recover", "fsck", "demo", "completion"),
}

EXAMPLES: Mapping[str, Sequence[tuple[str, str]]] = {
    "domain define": (("domain define web.toml", "the file says memory, CPUs and disks"),),
    "domain attach": (
        ("domain attach web --qmp /run/web.qmp", "a QEMU that something else started"),
        ("domain attach web --driver libvirt", "the libvirt domain web, of qemu:///system"),
    ),
    "domain discover": (("domain discover", "what runs here, and the command that attaches to it"),),
    "domain start": (("domain start web", "it runs on when the command is done"),),
    "domain shutdown": (
        ("domain shutdown web", "asks the guest, and waits"),
        ("domain shutdown web --force-after 60", "pulls the plug after a minute"),
    ),
    "domain undefine": (("domain undefine web --snapshots", "with all its snapshots; the disks stay as they are"),),
    "domain tag": (("domain tag web production nightly", "for `select.tags` in a plan"),),
    "domain logs": (("domain logs web --lines 20", "why it did not start"),),
    "create": (
        ("create web before-upgrade --live", "memory and disks, while the guest runs"),
        ("create web", "the guest is paused until its memory is on disk; the name is the time"),
        ("create web cold --disk-only", "only the disks, of a machine that is off"),
        ("create web fs --disk-only --quiesce", "only the disks, of a guest whose agent freezes its file systems"),
        ("create --group web,db pair --live", "both at one point"),
    ),
    "list": (
        ("list web", "oldest first; * is the current one"),
        ("list web --names", "for a script"),
        ("list web --sort size --columns name,size", "what takes the room"),
    ),
    "tree": (("tree web", "which came from which"),),
    "show": (("show web before-upgrade", "files, sizes, pause"),),
    "revert": (
        ("revert web before-upgrade", "what it holds now, and no snapshot does, is lost"),
        ("revert web before-upgrade --save-current broken", "keeps what it holds now"),
        ("revert web before-upgrade --yes", "asks nothing, as where there is no terminal"),
        ("revert web cold --running", "boots from the disks of a snapshot without memory"),
    ),
    "delete": (
        ("delete web before-upgrade --dry-run", "what would merge, and which files would go"),
        ("delete web before-upgrade", "what the guest and other snapshots hold stays"),
        ("delete web before-upgrade --children", "with all that came from it"),
    ),
    "edit": (("edit web before-upgrade --name golden --description 'known good'", "files stay as they are"),),
    "pin": (("pin web golden", "no retention deletes it"), ("pin web golden --off", "it may again")),
    "verify": (
        ("verify web golden", "reads every file"),
        ("verify web golden --boot", "and runs a throw-away copy"),
        ("verify web --all", "all of them"),
    ),
    "prune": (
        ("prune web --daily 7 --weekly 4 --dry-run", "what would go"),
        ("prune --last 10", "of every domain, keep the ten newest"),
    ),
    "flatten": (("flatten web --depth 2", "what it writes to lies on the chain's base then"),),
    "clone": (("clone web golden test --count 3 --start", "test-1, test-2 and test-3 go on from the point"),),
    "export": (
        ("export web golden web.tar", "one file, for another host"),
        ("export web golden - | ssh other 'cat > web.tar'", "without a file here"),
    ),
    "export-disk": (("export-disk web golden vda web.qcow2", "one disk, which needs no other file"),),
    "import": (("import web.tar --as web2", "a new domain with one snapshot; then: revert"),),
    "batch check": (("batch check nightly.toml", "every place that is wrong"),),
    "batch run": (("batch run nightly.toml", "cut short, it goes on where it was"),),
    "batch schedule": (("batch schedule /etc/snaporch/plans", "runs each plan when it is due"),),
    "serve": (
        ("serve", "on a unix socket below the root"),
        ("serve --listen 127.0.0.1:8443", "on TCP too, as service.toml says, for holders of tokens"),
    ),
    "token make": (("token make ci --role operator", "prints the secret, once"),),
    "watch": (("watch web", "until Ctrl-C"),),
    "doctor": (("doctor", "what this host can do"), ("doctor web", "what a checkpoint of it would take")),
    "operations": (
        ("operations", "the last 20"),
        ("operations web --failed --since 1d", "what went wrong since yesterday"),
    ),
    "operations give-up": (("operations give-up 0123 --dry-run", "what would be kept and lost"),),
    "recover": (("recover", "after a crash; every other verb does it too"),),
    "fsck": (("fsck", "changes nothing"), ("fsck web --repair", "does what is certain")),
    "demo": (("demo", "boots a guest of its own, and shows all of it"),),
    "completion": (("completion bash > /etc/bash_completion.d/snaporch", "from the next shell on"),),
}


def arrange(app: App) -> None:
    """Put the program's verbs into their groups, and the examples below the help of each."""
    for order, (heading, verbs) in enumerate(GROUPS.items()):
        group = Group(heading, sort_key=order)
        for verb in verbs:
            app[verb].group = group
    for words, examples in EXAMPLES.items():
        sub = app
        for word in words.split():
            sub = sub[word]
        lines = "\n".join(f"- `snaporch {command}`: {what}" for command, what in examples)
        sub.help_epilogue = f"For example:\n\n{lines}"
