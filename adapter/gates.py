"""Hooks that fire only under a flag: asking for one by name without it is an error."""

from __future__ import annotations

from typing import Any

GATES = {
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
}


def refuse_gated(bridge: Any, names_filter: Any) -> None:
    """Refuse to cache, by name, what no forward will fire.

    TransformerLens does so for ``add_hook``, ``hooks()`` and ``run_with_hooks``, and only warns
    where it caches. A callable filter is no request for any one name, and is not refused.

    Raises:
        ValueError: If a name of a string or list is that of a hook whose flag is off.
    """
    names = [names_filter] if isinstance(names_filter, str) else names_filter
    if not isinstance(names, list):
        return
    points = bridge.hook_dict
    for name in names:
        hook = str(points[name].name if name in points else name).rsplit(".", 1)[-1]
        flag = GATES.get(hook)
        if flag and not getattr(bridge.cfg, flag, False):
            raise ValueError(
                f"cannot cache {name}: it fires only under {flag}; call set_{flag}(True) first"
            )
