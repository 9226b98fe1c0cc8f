# The ways between host and guest in User-mode Linux: hostfs for files, serial lines for streams.

# mount_host FOLDER: the host's root, read-only.
mount_host() {
	mount -t hostfs -o ro,/ host "$1"
}

# mount_results FOLDER: the one folder of the host that may be written. The path is the host's, seen by the kernel's
# own process, which runs in a folder with a link to it.
mount_results() {
	mount -t hostfs -o /proc/self/cwd/results results "$1"
}

# port NAME: its device, by the order of the ports in start.py. It must be opened once and held: the kernel closes the
# host's end when nobody has it open any more.
port() {
	case $1 in
	control) echo /dev/ttyS1 ;;
	out) echo /dev/ttyS2 ;;
	err) echo /dev/ttyS3 ;;
	log) echo /dev/ttyS4 ;;
	esac
}

# terminal: the device of the port `out` when it is a terminal.
terminal() {
	port out
}

# plain: makes the port on standard input pass every byte as it is. A serial line begins as a terminal.
plain() {
	stty raw -echo
}
