#!/bin/sh
# Installs the Debian packages that the tests need. What is a service among them is for the lab's guest alone: here it
# is started neither now (policy-rc.d) nor when this machine starts.
set -e

policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
	trap 'rm -f $policy' EXIT
	trap 'exit 1' HUP INT TERM
	printf '#!/bin/sh\nexit 101\n' >$policy
	chmod 755 $policy
fi

new=
for service in krb5-kdc krb5-admin-server smbd nmbd winbind samba-ad-dc ssh nfs-kernel-server rpcbind; do
	[ -e /lib/systemd/system/$service.service ] || new="$new $service.service"
done
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
[ -z "$new" ] || ! command -v systemctl >/dev/null || systemctl disable -q $new
