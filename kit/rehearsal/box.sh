#!/bin/sh
# Makes a new root folder of parts of this machine and runs a command in it. box.py starts this in namespaces of its own, so nothing of it
# is seen outside, and all of it ends with the command.
#   box.sh EMPTY_FOLDER {ro|rw SOURCE PLACE | link TARGET PLACE}... -- COMMAND...
set -eu
PATH=$PATH:/usr/sbin:/sbin
root=$1
shift
mount -t tmpfs -o mode=755,size=64m tmpfs "$root"

while [ "$1" != -- ]; do
  kind=$1 source=$2 place=$root$3
  shift 3
  mkdir -p "${place%/*}"
  if [ "$kind" = link ]; then
    ln -s "$source" "$place"
    continue
  fi
  if [ -d "$source" ]; then mkdir -p "$place"; elif [ ! -e "$place" ]; then : > "$place"; fi
  mount --rbind "$source" "$place"
  if [ "$kind" = ro ]; then
    # An ordinary user may not take away what the mount already forbids (nosuid, nodev, …): say it again.
    options=$(findmnt --noheadings --output VFS-OPTIONS --mountpoint "$place" | tail -n 1)
    mount -o "remount,bind,ro${options#r[ow]}" "$place"
  fi
done
shift

mkdir -p "$root/proc" "$root/run" "$root/root" "$root/home" "$root/var/tmp"
mount --rbind /proc "$root/proc"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ip link set lo up 2>/dev/null || true # for servers of the notebook's own; its kernel is reached without

code=0
chroot "$root" "$@" || code=$? # not exec: the first process of a namespace is deaf to most signals
exit "$code"
