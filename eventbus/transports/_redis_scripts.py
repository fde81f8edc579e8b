"""What must happen at once on the server: taking, settling and leaving, each only by whoever has the right."""

__all__ = ("ACK", "CLAIM", "KEEP", "LEAVE", "OWN", "REJECT", "TAKE", "TIDY")

ACK = """
local most, held, lost = tonumber(ARGV[3]), {}, {}
if most <= 16 * (#ARGV - 3) then
  for _, one in ipairs(redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', most, ARGV[2])) do held[one[1]] = true end
end
for i = 4, #ARGV do
  local id = ARGV[i]
  if not held[id] then
    local found = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1)
    held[id] = found[1] and found[1][2] == ARGV[2]
  end
  if held[id] then redis.call('XACK', KEYS[1], ARGV[1], id) else lost[#lost + 1] = id end
end
return lost
"""
"""stream | group consumer most id... -> those that are no longer ours; ``most``, what the consumer may hold, is looked
through at once where that is quicker than asking for each."""

KEEP = """
local lost = {}
for i = 3, #ARGV, 3 do
  local id = ARGV[i]
  local held = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  if held[1] and held[1][2] == ARGV[2] then
    local times = held[1][4] - ARGV[i + 2]
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'IDLE', ARGV[i + 1], 'RETRYCOUNT', times, 'JUSTID')
  else
    lost[#lost + 1] = id
  end
end
return lost
"""
"""stream | group consumer (id idle uncounted)... -> those that are no longer ours; the rest has been idle so long."""

REJECT = """
local held = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if not (held[1] and held[1][2] == ARGV[2]) then return 0 end
local found = redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3])
local fields = found[1] and found[1][2] or {}
for i = 4, #ARGV do fields[#fields + 1] = ARGV[i] end
redis.call('XADD', KEYS[2], '*', unpack(fields))
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
return 1
"""
"""stream dead-stream | group consumer id (field value)... -> 1 if it was ours; copied first, then acknowledged."""

CLAIM = """
if KEYS[2] then
  if redis.call('GET', KEYS[2]) ~= ARGV[2] then return redis.error_reply('NOTOWNER') end
  redis.call('PEXPIRE', KEYS[2], ARGV[6])
end
local got = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], 'COUNT', ARGV[5])
local entries, counts = {}, {}
for _, entry in ipairs(got[2]) do
  if entry then
    local held = redis.call('XPENDING', KEYS[1], ARGV[1], entry[1], entry[1], 1)
    entries[#entries + 1] = entry
    counts[#counts + 1] = held[1] and held[1][4] or 1
  end
end
return {got[1], entries, counts, got[3] or {}}
"""
"""stream [owner] | group consumer min-idle cursor count [lease] -> cursor, entries, their counts, ids that are gone."""

OWN = """
for _, raw in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = {}
  for i = 1, #raw, 2 do group[raw[i]] = raw[i + 1] end
  if group['name'] == ARGV[1] then
    if redis.call('SET', KEYS[2], ARGV[2], 'NX', 'PX', ARGV[3]) then return group['last-delivered-id'] end
    return false
  end
end
return redis.error_reply('NOGROUP the group is gone')
"""
"""stream owner | group consumer lease -> the newest entry that the group has had, if the group is ours now."""

TAKE = """
if redis.call('GET', KEYS[2]) ~= ARGV[2] then return redis.error_reply('NOTOWNER') end
redis.call('PEXPIRE', KEYS[2], ARGV[3])
if tonumber(ARGV[4]) < 1 then return false end
return redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', ARGV[4], 'STREAMS', KEYS[1], '>')
"""
"""stream owner | group consumer lease count -> what nobody had yet, while the group is ours."""

LEAVE = """
for i = 4, #ARGV do
  local held = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1)
  if held[1] and held[1][2] == ARGV[2] then
    local times = held[1][4] - 1
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'IDLE', ARGV[3], 'RETRYCOUNT', times, 'JUSTID')
  end
end
if redis.call('GET', KEYS[2]) == ARGV[2] then redis.call('DEL', KEYS[2]) end
local left = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])
if not left.err and #left == 0 then redis.pcall('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2]) end
return 1
"""
"""stream owner | group consumer lease id... ; hands these back, and forgets a consumer that has nothing."""

TIDY = """
local function parts(id)
  local time, number = string.match(id, '(%d+)-(%d+)')
  return tonumber(time), tonumber(number)
end
local lowest, time, number
for _, raw in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = {}
  for i = 1, #raw, 2 do group[raw[i]] = raw[i + 1] end
  local pending = redis.call('XPENDING', KEYS[1], group['name'])
  local id = pending[1] > 0 and pending[2] or group['last-delivered-id']
  local t, n = parts(id)
  if not lowest or t < time or (t == time and n < number) then lowest, time, number = id, t, n end
  for _, one in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], group['name'])) do
    local consumer = {}
    for i = 1, #one, 2 do consumer[one[i]] = one[i + 1] end
    if consumer['pending'] == 0 and consumer['idle'] > tonumber(ARGV[1]) then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[1], group['name'], consumer['name'])
    end
  end
end
if ARGV[2] == '1' and lowest then return redis.call('XTRIM', KEYS[1], 'MINID', '~', lowest) end
return 0
"""
"""stream | idle trim -> how many were removed that every group has settled; forgets consumers long silent."""
