# Process 1 after the root was switched: furnishes the guest, runs the command, reports, and powers off.
# Beside it in /run/lab lie `settings` (shell variables), `paths` (calls of keep, traversable), `command`, and
# `kernel.sh`: what depends on which of the lab's kernels this is.

lab=/run/lab
. $lab/settings
. $lab/kernel.sh

# control goes both ways; the others carry the command's output, its errors, and the kernel's log.
control=$(port control) log=$(port log)
exec 3<>$control 7>$log
plain <&3
plain <&7

# --- a root that looks lived in -----------------------------------------------------------------------------------
# Folders that start empty here, so that commands may write to them; the host's own are behind $lab/root meanwhile.
mkdir $lab/root
mount --bind / $lab/root
mkdir -p /tmp /home /dev/pts /dev/shm /dev/mqueue
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=0755 home /home
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t devpts -o gid=5,mode=0620,ptmxmode=0666 pts /dev/pts
mount -t mqueue mqueue /dev/mqueue
mount -t cgroup2 cgroup /sys/fs/cgroup
ln -sf /proc/self/fd /dev/fd
for number in 0:stdin 1:stdout 2:stderr; do
	ln -sf /proc/self/fd/${number%:*} /dev/${number#*:}
done
mkdir -p /run/lock /run/user
chmod 1777 /run/lock

# keep PATH: shows the host's PATH although an ancestor of it starts empty.
keep() {
	[ -e "$1" ] && return
	mkdir -p "$1"
	mount --bind "$lab/root$1" "$1"
}
# traversable FOLDER: lets the guest's users pass through, whatever their groups; only the scratch layer changes.
traversable() {
	chmod a+x "$1"
}
. $lab/paths

mkdir -p "/lib/modules/$RELEASE"
mount --bind "$lab/root$MODULES" "/lib/modules/$RELEASE"
umount -l $lab/root

# --- people, names, helpers ---------------------------------------------------------------------------------------
person() { # NAME UID
	echo "$1:*:$2:$2:$1:/home/$1:/bin/sh" >>/etc/passwd
	echo "$1:*:$2:" >>/etc/group
	mkdir -m 0700 /home/$1
	chown $2:$2 /home/$1
}
sed -i '/^\(alice\|bob\):/d; s|^root:\(.*\):/root:|root:\1:/home/root:|' /etc/passwd
sed -i '/^\(alice\|bob\):/d' /etc/group
person alice 5001
person bob 5002
mkdir -m 0700 /home/root
hostname lab
printf '127.0.0.1 localhost lab\n::1 localhost\n' >/etc/hosts
ip link set lo up

# The module tools are busybox's, first in PATH: its depmod made the index, which kmod's could not read.
mkdir $lab/bin $lab/fallback
for tool in modprobe insmod rmmod lsmod modinfo depmod; do
	ln -s ../busybox $lab/bin/$tool
done
$lab/busybox --install -s $lab/fallback
echo $lab/bin/modprobe >/proc/sys/kernel/modprobe
echo 0 >/proc/sys/kernel/panic_on_oops

mkdir -p /results
mount_results /results

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
session_of 1
ours=$session
for process in /proc/[0-9]*; do
	session_of ${process#/proc/}
	[ "$session" = "$ours" ] || kill -9 ${process#/proc/} 2>/dev/null
done
# But who hangs in a broken kernel cannot be ended: so this wait has a limit, and nothing below may sync.
if [ ! "$INTERACTIVE" ]; then
	for try in $(seq 40); do
		[ -e $lab/out.through ] && [ -e $lab/err.through ] && break
		sleep 0.05
	done
fi
echo "lab: the command ended with $code $MARK" >/dev/kmsg
printf %s "$MARK" >&5
[ "$INTERACTIVE" ] || printf %s "$MARK" >&6
echo "exit $code" >&3
read -r -t 10 answer <&3 # the host has everything
poweroff -n -f
