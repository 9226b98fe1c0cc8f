"""Mounts eCryptfs for ordinary users, in a source with a process of its own, by descriptors instead of paths.

`process` accepts requests and forks a child for each; `requester` establishes which process asks; `mounter` checks and
mounts, in the child; `client` is the user's side. It needs no broker: its socket is mount.sock in the broker's folder.
"""
