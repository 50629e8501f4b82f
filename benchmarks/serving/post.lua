-- wrk's script: posts prepared bodies in turn and prints one line of JSON.
--   wrk ... -s post.lua URL -- FOLDER COUNT CONTENT_TYPE ACCEPT STAMP RATE FROM TO [HEAD]
-- STAMP > 0 writes a counter at that offset of each body: no two images are alike (for BMP, whose pixels lie bare).
-- RATE > 0 makes it an open loop: arrivals are a Poisson process fixed in advance, and the next free connection takes
-- the next arrival. wrk's latency starts when a request is sent; where all connections were busy at its arrival the
-- wait before that is not in it, so `late` counts those and `lag` is the longest wait (ms). Timers tick in whole ms.
-- FROM, TO: `answered` counts the good answers between these times of the monotonic clock, when the load is steady: wrk's
-- own count leaves out what the server worked on at the end.
-- HEAD: bytes of each body before its binary tail, for the Open Inference Protocol.
local ffi = require("ffi")
ffi.cdef("typedef struct { long s, ns; } when; int clock_gettime(int, when *);")
local time = ffi.new("when")
local function now()
  ffi.C.clock_gettime(1, time)
  return tonumber(time.s) + tonumber(time.ns) / 1e9
end

local threads, bodies, requests, turn = {}, {}, {}, 0
late, lag, sent, answered = 0, 0, 0, 0

function setup(thread)
  thread:set("seed", #threads)
  table.insert(threads, thread)
end

function init(args)
  local folder, count, stamp, rate = args[1], tonumber(args[2]), tonumber(args[5]), tonumber(args[6])
  local headers = { ["Content-Type"] = args[3], ["Accept"] = args[4] }
  headers["Inference-Header-Content-Length"] = args[9]
  for i = 1, count do
    local file = assert(io.open(string.format("%s/%04d", folder, i - 1), "rb"))
    bodies[i] = file:read("*a")
    file:close()
    requests[i] = wrk.format("POST", nil, headers, bodies[i])
  end
  local from, to = tonumber(args[7]), tonumber(args[8])
  response = function(status)
    local time = now()
    if status == 200 and time >= from and time < to then answered = answered + 1 end
  end
  math.randomseed(os.time() + seed)
  turn = math.random(count)
  request = function()
    turn, sent = turn % count + 1, sent + 1
    if stamp == 0 then return requests[turn] end
    local mark, body = string.format("%08x%08x", sent, math.random(2 ^ 31)), bodies[turn]
    return wrk.format("POST", nil, headers, body:sub(1, stamp) .. mark .. body:sub(stamp + #mark + 1))
  end
  if rate > 0 then
    local due = now()
    delay = function()
      due = due - math.log(1 - math.random()) / rate
      local wait = (due - now()) * 1000
      if wait < -1 then late, lag = late + 1, math.max(lag, -wait) end
      return math.max(0, wait)
    end
  end
end

function done(summary, latency)
  local late, lag, answered = 0, 0, 0
  for _, thread in ipairs(threads) do
    late, lag = late + thread:get("late"), math.max(lag, thread:get("lag"))
    answered = answered + thread:get("answered")
  end
  local e = summary.errors
  print(string.format(
    'JSON {"answered": %d, "sent": %d, "bad": %d, "broken": %d, "p50": %f, "p99": %f, "late": %d, "lag": %f}',
    answered, summary.requests, e.status, e.connect + e.read + e.write + e.timeout,
    latency:percentile(50) / 1e6, latency:percentile(99) / 1e6, late, lag / 1e3))
end
