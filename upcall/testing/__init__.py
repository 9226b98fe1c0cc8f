"""Provides plugin authors with contract suites, a simulated kernel, and brokers and daemons to start.

`contract` checks a key module, `pem_contract` its key files, `daemon_contract` the module in a daemon; `toy` is a
module that passes. `handlercontract` checks a message handler. `processes` starts a broker and daemons in folders of
their own. `played` simulates a broker, daemon or requester that sends what a test specifies. `kernel` simulates
/dev/ecryptfs. Nothing here needs a privilege, except `lab`, or changes the user's keyring.
"""

import sys

if pytest := sys.modules.get("pytest"):  # rewrites these modules' asserts, too, to show the compared values
    pytest.register_assert_rewrite("upcall.testing.pem_contract", "upcall.testing.daemon_contract")
