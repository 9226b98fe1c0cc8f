# Runs the command, reports, and powers off: process 1, or a service of the init that is.

lab=/run/lab
. $lab/settings
. $lab/kernel.sh

# control goes both ways; the others carry the command's output, its errors, and the kernel's log.
control=$(port control) log=$(port log)
exec 3<>$control 7>$log
plain <&3
plain <&7

# --- the command --------------------------------------------------------------------------------------------------
# relay FIFO: carries what is written to it to standard output, and leaves a sign when all is through.
relay() {
	cat "$1"
	: >"$1.through"
}
cat /dev/kmsg >&7 &
echo ready >&3

# Pipes stand between the command and the ports: a port can be opened only once, so /dev/stdout would fail on it.
# The command runs in the foreground, because a shell lets background commands ignore SIGINT for good.
if [ "$INTERACTIVE" ]; then
	terminal=$(terminal)
	exec 5<>$terminal
	stty rows "$ROWS" cols "$COLUMNS" <&5
	setsid -c sh $lab/command 3>&- 5>&- 7>&- <$terminal >$terminal 2>&1
else
	out=$(port out) err=$(port err)
	exec 5>$out 6>$err
	plain <&5
	plain <&6
	mkfifo -m 0666 $lab/out $lab/err
	relay $lab/out >&5 &
	relay $lab/err >&6 &
	setsid sh $lab/command 3>&- 5>&- 6>&- 7>&- </dev/null >$lab/out 2>$lab/err
fi
code=$?

# --- the end ------------------------------------------------------------------------------------------------------
# What the command left running ends with it, or the pipes would stay open. It is known by its session: setsid gave
# the command one of its own.
session_of() { # PID; the answer is in $session, because a subshell for each process would take a second in all
	session=gone
	read -r line 2>/dev/null <"/proc/$1/stat" || return
	set -- ${line##*) } # state, parent, group, session
	session=$4
}
session_of $$
ours=$session
for process in /proc/[0-9]*; do
	session_of ${process#/proc/}
	[ "$session" = "$ours" ] || kill -9 ${process#/proc/} 2>/dev/null
done
# But who hangs in a broken kernel cannot be ended: so this wait has a limit, and nothing below may sync.
if [ ! "$INTERACTIVE" ]; then
	for try in $(seq 400); do
		[ -e $lab/out.through ] && [ -e $lab/err.through ] && break
		sleep 0.05
	done
fi
echo "lab: the command ended with $code $MARK" >/dev/kmsg
if [ "$INTERACTIVE" ]; then
	printf %s "$MARK" >$terminal # anew: it was hung up when the command ended, whose own it was
else
	printf %s "$MARK" >&5
	printf %s "$MARK" >&6
fi
echo "exit $code" >&3
read -r -t 60 answer <&3 # the host has everything
poweroff -n -f
