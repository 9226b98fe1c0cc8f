# The ways between host and guest under QEMU: 9p for files, virtio ports for streams.

# mount_host FOLDER: the host's root, read-only.
mount_host() {
	mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro host "$1"
}

# mount_results FOLDER: the one folder of the host that may be written.
mount_results() {
	mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 results "$1"
}

# port NAME: its device. Ports appear some time after their driver was loaded, under numbers that are not ours.
port() {
	for try in $(seq 100); do
		for each in /sys/class/virtio-ports/*; do
			if [ "$(cat $each/name 2>/dev/null)" = "$1" ]; then
				echo /dev/${each##*/}
				return
			fi
		done
		sleep 0.1
	done
	echo "lab: there is no port $1" >/dev/console
	poweroff -f
}

# terminal: the device of the port `out` when it is a terminal.
terminal() {
	port out >/dev/null
	echo /dev/hvc0
}

# plain: makes the port on standard input pass every byte as it is, which these do by themselves.
plain() {
	:
}
