"""Attacks on the link between broker and daemon, by ordinary uids.

Programs know what every uid can see: /proc/net/netlink, pids, and the sockets that are open to all. Scenes (test_*.py)
start a broker, the victim's daemon and load, let a program attack, and count.

    UPCALL_ATTACK_TRIES=500 python -m pytest tests/attacks        each attack so many times
    UPCALL_ATTACK_TREE=DIR python -m pytest tests/attacks         against the code of another tree, which has a .venv
"""
