#!/usr/bin/env bash
# Ceph's radosgw, a real S3 server, on loopback: one monitor and one OSD in a file, in the foreground.
#   apt-get install -y --no-install-recommends radosgw ceph-mon ceph-osd ceph-common
#   radosgw.sh DATADIR PORT MONITOR_PORT KEY SECRET READER_KEY READER_SECRET
# Ready when http://127.0.0.1:PORT/ answers. The user `leaf` may do all, `reader` what policies say.
set -e
D=$1 PORT=$2 MON=$3
mkdir -p "$D"/{mon,osd,run}
trap 'kill $(jobs -p) 2>/dev/null' EXIT
export CEPH_CONF=$D/ceph.conf
FSID=11111111-2222-3333-4444-555555555555 OSD=aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee
# One of everything, little memory, and no waiting for votes of other monitors.
cat >"$CEPH_CONF" <<C
[global]
fsid = $FSID
mon host = v2:127.0.0.1:$MON
public addr = 127.0.0.1
cluster addr = 127.0.0.1
run dir = $D/run
keyring = $D/keyring
auth allow insecure global id reclaim = false
admin socket = $D/run/\$name.asok
log file = $D/run/\$name.log
pid file =
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
ms bind ipv6 = false
ms bind msgr1 = false
[mon]
mon data = $D/mon
mon data avail crit = 1
mon data avail warn = 2
mon cluster log to file = false
paxos propose interval = 0.02
paxos min wait = 0.01
[osd]
osd data = $D/osd
osd objectstore = bluestore
osd memory target = 939524096
osd client watch timeout = 3
bluestore block size = 6442450944
bluestore block wal create = false
bluestore block db create = false
[client]
rgw frontends = beast endpoint=127.0.0.1:$PORT tcp_nodelay=1
rgw thread pool size = 64
C
ceph() { /usr/bin/python3 /usr/bin/ceph --connect-timeout 20 "$@" >/dev/null; }
user() { timeout 60 radosgw-admin -n client.admin user create "$@" >/dev/null; }

monmaptool --create --fsid $FSID --addv a "[v2:127.0.0.1:$MON]" --clobber "$D/monmap" >/dev/null
ceph-authtool "$D/keyring" --create-keyring --gen-key -n mon. --cap mon 'allow *' >/dev/null
for name in client.admin client.rgw osd.0; do
  ceph-authtool "$D/keyring" --gen-key -n $name --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' >/dev/null
done
ceph-mon --mkfs -i a --monmap "$D/monmap" --keyring "$D/keyring"
ceph-mon -i a -f &
ceph osd new $OSD
ceph-osd -i 0 --mkfs --osd-uuid $OSD >/dev/null 2>&1
ceph osd crush add osd.0 1.0 root=default host=local
ceph-osd -i 0 -f &
user --uid=leaf --display-name=leaf --access-key="$4" --secret="$5"
user --uid=reader --display-name=reader --access-key="$6" --secret="$7"
radosgw -n client.rgw -f &
read -r _ || true  # until whoever started this is gone
