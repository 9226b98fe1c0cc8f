# Process 1 after the root was switched: furnishes the guest, and becomes the session or the init that was asked for.
# Beside it in /run/lab lie `settings` (shell variables), `paths` (calls of keep, traversable), `command`, and
# `kernel.sh`: what depends on which of the lab's kernels this is.

lab=/run/lab
. $lab/settings
. $lab/kernel.sh

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

if [ ! "$TRUSTED" ]; then
	mkdir -p /usr/lib/upcall
	printf '[trust]\ncheck = false\n' >/usr/lib/upcall/config.toml
fi

mkdir -p /results
mount_results /results

# --- process 1 -----------------------------------------------------------------------------------------------------
[ "$INIT" ] || exec $lab/busybox sh $lab/session.sh

# systemd runs the session and what that asks for, but nothing by itself: what this machine starts, mounts or checks
# when it boots is not the guest's concern.
: >/etc/fstab
rm -f /.dockerenv
hostname >/etc/hostname
rm -rf /etc/systemd/system /etc/systemd/user /usr/lib/systemd/system-generators
for target in sysinit local-fs sockets timers multi-user graphical; do
	rm -rf /usr/lib/systemd/system/$target.target.wants
done
mkdir -p /etc/systemd/system /etc/systemd/user
cat >/etc/systemd/system/lab.service <<end
[Unit]
DefaultDependencies=no
[Service]
ExecStart=$lab/busybox sh $lab/session.sh
StandardOutput=file:/dev/console
StandardError=file:/dev/console
end
exec "$INIT" --unit=lab.service --log-target=kmsg
