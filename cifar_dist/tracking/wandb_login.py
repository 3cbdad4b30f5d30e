"""The W&B mode of a run, from the environment and W&B's files. Imports no wandb and uses no network."""

import configparser
import netrc
import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from cifar_dist.config import WandbMode
from cifar_dist.errors import UserError

Mode = Literal["online", "offline", "disabled"]

# Both names of W&B's own server; a login under one is valid for the other.
OWN_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
ENVIRONMENT_MODES: dict[str, Mode] = {
    "online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled",
}  # fmt: skip


def resolve_mode(mode: WandbMode) -> tuple[Mode, bool]:
    """The mode to use, and whether it was given explicitly, by --track.wandb or WANDB_MODE.

    auto is WANDB_MODE if that is set; else offline after `wandb offline`; else online with a login; else offline.

    Raises:
        UserError: WANDB_MODE is unknown, or online was given without a login.
    """
    if mode != "auto":
        chosen, explicit = mode, True
    elif value := os.environ.get("WANDB_MODE"):
        if value not in ENVIRONMENT_MODES:
            valid = ", ".join(ENVIRONMENT_MODES)
            raise UserError(f"WANDB_MODE is {value!r}; valid: {valid}. --track.wandb MODE takes precedence.")
        chosen, explicit = ENVIRONMENT_MODES[value], True
    else:
        stored = ENVIRONMENT_MODES.get(_setting("mode") or "", "online")
        chosen, explicit = stored if stored != "online" or has_login() else "offline", False
    if chosen == "online" and not has_login():
        raise UserError(
            f"W&B online was asked for, but there is no login for {_host()}: neither WANDB_API_KEY "
            f"nor an entry in {_netrc_path()}.\n"
            "Log in with `wandb login`, or give --track.wandb offline or --track.wandb disabled."
        )
    return chosen, explicit


def has_login() -> bool:
    """Whether wandb would find credentials for the configured server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _setting("api_key"):
        return True
    try:
        entries = netrc.netrc(_netrc_path())
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False
    hosts = OWN_HOSTS if _host() in OWN_HOSTS else (_host(),)
    found = (entries.authenticators(host) for host in hosts)
    return any(entry is not None and entry[2] for entry in found)


def _host() -> str:
    url = os.environ.get("WANDB_BASE_URL") or _setting("base_url")
    return urlsplit(url).netloc if url else OWN_HOSTS[0]


def _netrc_path() -> Path:
    return Path(os.environ.get("NETRC") or "~/.netrc").expanduser()


def _setting(name: str) -> str | None:
    """A value of W&B's settings files, of which the one in the working directory comes first."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([folder / "settings", Path("wandb", "settings")])
    except (OSError, configparser.Error, UnicodeDecodeError):
        return None
    return parser.get("default", name, fallback=None)
