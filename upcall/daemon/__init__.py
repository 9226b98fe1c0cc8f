"""The daemon: one per uid, with the user's own rights.

Threads. The *main* thread registers with the broker, watches whether it lives, serves the user's own commands
(unlock, lock) and takes signals. *Workers* block in recvmsg on the one netlink socket: the kernel wakes one of them
per message, and that one sees it through: decode, look up the key, call the module, answer. Handing a message to
another thread would cost more than most answers do. As many wait there as there are processors; when the last of
them gets work from a key that has been slow, one more is started, up to a bound, and ends when it is not needed. A
*watch*, asleep while nobody works, starts one for keys that have always been quick and now are not. One thread
writes the log. One, if the keys are to lock by themselves, waits for that (locking.py).

Lanes. Each key has a lane per service that holds a few workers at most; what comes beyond that waits in the lane's
own queue, and the worker goes back to the socket. So a module that hangs holds its lane's workers and nobody else's,
and its lane refuses at once when all it holds is overdue.

Ownership. The socket belongs to `Daemon`; it is connected to the broker's socket for this daemon, so that the kernel
refuses everybody else, and lives on when the broker does not. A request belongs to the worker that took it, which
answers it once, or to the lane's queue. Keys and passphrases belong to `KeyService`.

Shutdown. SIGTERM sends QUIT; the broker asks nothing more, waits for what we hold, and says QUIT in its turn; then the
process ends. A QUIT that we did not ask for says that a newer daemon has taken over, our open requests included.
"""
