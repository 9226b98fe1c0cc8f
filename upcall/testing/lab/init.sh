#!/bin/busybox sh
# The guest's first program. It loads what is needed to see the host's files, lays a scratch layer over them, and makes
# that the root: by switch_root, because the kernel looks for its helpers (/sbin/request-key) in the root of process 1.

fail() {
	echo "lab: $*" >/dev/console
	sleep 0.2
	poweroff -f
}

/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin # by name, because /proc, where busybox would find itself, is moved below
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
. /lab/kernel.sh
for module in /modules/*; do
	insmod "$module" || fail "cannot load $module"
done

mount_host /host || fail "cannot mount the host's files"
mount -t tmpfs -o mode=0755 scratch /scratch
mkdir /scratch/upper /scratch/work
mount -t overlay -o lowerdir=/host,upperdir=/scratch/upper,workdir=/scratch/work root /newroot ||
	fail "cannot lay the scratch layer over the host's files"

for moved in dev proc sys; do
	mkdir -p /newroot/$moved
	mount --move /$moved /newroot/$moved
done
mkdir -p /newroot/run
mount -t tmpfs -o mode=0755 run /newroot/run
mkdir /newroot/run/lab
cp /bin/busybox /lab/* /newroot/run/lab/
exec switch_root /newroot /run/lab/busybox sh /run/lab/furnish.sh
