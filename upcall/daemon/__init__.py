"""Answers a user's requests, in one process per uid with the user's permissions.

Threads. The *main* thread registers with the broker, detects its end, serves the user's commands (unlock, lock) and
handles signals. One *worker*, the leader, blocks in recvmsg on the netlink socket, and does all the work for a
message: parse, look up the key, call the module, answer. Passing it to another thread would cost more than most
answers. Before work that is long enough for another processor, the leader promotes a parked follower, which goes to
the socket. A *watch* thread, asleep while no job runs, promotes one when a usually quick key is slow. One thread
writes the log. One, if configured, locks keys automatically (upcall/protocols/ecryptfs/auto_lock.py).

Lanes. Each key has a lane per service, which occupies a few workers at most. Further jobs wait in the lane's queue,
and the worker returns to the socket. So a module that hangs occupies its lane's workers only. The lane refuses new
jobs at once while all its running ones are overdue.

Ownership. The socket belongs to `Daemon`. It is connected to the broker's socket for this daemon, so that the kernel
refuses messages of other processes; it stays open when the broker ends. A request belongs to the worker that received
it, which answers it once, or to the lane's queue. Keys and passphrases belong to `KeyCache`.

Shutdown. On SIGTERM the daemon sends QUIT. The broker sends no more requests, waits for the pending answers, and
replies with QUIT; then the process ends. A QUIT without request means that a newer daemon has taken over, with the
pending requests.
"""
