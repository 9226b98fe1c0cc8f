"""Attacks the link between broker and daemon, as ordinary uids.

The attacking programs use what every uid can see: /proc/net/netlink, pids, and the sockets that are open to all. Tests
(test_*.py) start a broker, the victim's daemon and load, run an attack, and count its successes.

    UPCALL_ATTACK_TRIES=500 python -m pytest tests/attacks        repeats each attack
    UPCALL_ATTACK_TREE=DIR python -m pytest tests/attacks         attacks the code of another tree, which has a .venv
"""
