#!/bin/sh
# The first process of a machine of nfs.py. What it needs comes as variables from the kernel's
# command line: ADDRESS, AGENT, FOLDER, HOST, LEASE, MODULES, PYTHON, ROLE, SERVER, SHARE.
# All files but the mounts below are those of the computer that the test runs on.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
set -e
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
hostname "$HOST"
ip link set lo up
ip address add "$ADDRESS/24" dev vec0
ip link set vec0 up

if [ "$ROLE" = server ]; then
    modprobe -d "$MODULES" nfsd
    mount /dev/ubda /srv
    mkdir -p /srv/share /srv/nfs/v4recovery /srv/nfs/nfsdcltrack
    touch /srv/nfs/etab /srv/nfs/rmtab
    mount --bind /srv/nfs /var/lib/nfs # its list of clients outlives a crash, as on a real server
    mount --bind /srv/share "$SHARE"
    mount -t nfsd nfsd /proc/fs/nfsd
    echo "$LEASE" >/proc/fs/nfsd/nfsv4leasetime
    echo "$LEASE" >/proc/fs/nfsd/nfsv4gracetime
    exportfs -i -o rw,sync,no_root_squash,fsid=0,no_subtree_check '*:/srv/share'
    rpc.mountd -N 2 -N 3
    rpc.nfsd -N 3 4
else
    modprobe -d "$MODULES" nfsv4
    mount -t nfs4 -o vers=4.2 "$SERVER:/" "$SHARE"
fi
exec "$PYTHON" "$AGENT" "$FOLDER"
