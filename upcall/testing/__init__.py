"""Provides plugin authors with a contract suite for key modules, a simulated kernel, and brokers and daemons to start.

`contract` checks a key module, `pem_contract` its key files, `daemon_contract` the same in a daemon; `toy` is one that
passes. `processes` starts a broker and daemons in folders of their
own; `played` stands in for a daemon or a requester that says whatever the test wants; `kernel` stands in for
/dev/ecryptfs. Nothing here needs a privilege, and nothing touches the user's own keyring.
"""

import sys

if pytest := sys.modules.get("pytest"):  # its tests of ours say what was compared, as their own do
    pytest.register_assert_rewrite("upcall.testing.pem_contract", "upcall.testing.daemon_contract")
